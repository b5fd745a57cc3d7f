#!/bin/bash
# experiments/launch/tpu_pod.sh NAME ZONE sorax train --config experiments/quickstart.py --workdir gs-or-nfs/runs/x ...
#
# Runs a command on all workers of a Cloud TPU (install first: tpu_pod.sh NAME ZONE pip install 'sorax[tpu]').
# The run folder is on a file system that all workers mount. Several slices: a queued resource with --node-count; their
# workers find each other, and the mesh takes `slices` from the devices.
set -euo pipefail
name=$1 zone=$2
shift 2
exec gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$(printf '%q ' "$@")"
