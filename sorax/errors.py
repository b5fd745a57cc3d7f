"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """Bad input: the message says what was wrong, where, and what to do. The command line prints it and exits 2."""
