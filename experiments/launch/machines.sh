#!/bin/bash
# experiments/launch/machines.sh "host0 host1 host2" --config experiments/quickstart.py --workdir /shared/runs/x ...
#
# One process a machine, by ssh; the first is the coordinator. The folder that this is called from, with sorax installed,
# is there on all of them. When one process fails, the others end too (README.md); Ctrl-C ends all.
set -uo pipefail
read -ra hosts <<<"$1"
shift
port=${PORT:-12355}
tasks=()
trap 'kill "${tasks[@]}" 2>/dev/null' INT TERM
for k in "${!hosts[@]}"; do
    command=(sorax train "$@" --coordinator "${hosts[0]}:$port" --processes "${#hosts[@]}" --process "$k")
    ssh -tt "${hosts[$k]}" "cd $(printf %q "$PWD") && $(printf '%q ' "${command[@]}")" </dev/null 2>&1 | sed "s/^/$k: /" &
    tasks+=($!)
done
failed=0
for task in "${tasks[@]}"; do wait "$task" || failed=1; done
exit $failed
