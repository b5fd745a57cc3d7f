"""`sorax plan`: what a training would take on TPUs that are not here."""
