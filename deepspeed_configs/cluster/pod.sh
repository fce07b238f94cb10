#!/usr/bin/env bash
# The ranks of one pod of a PyTorchJob or a Job, one for each of GPUS_PER_POD: pod.sh ARGUMENTS OF t2i/train.py
#
# The operator numbers pods, not ranks: RANK is the pod's number and WORLD_SIZE how many pods there are. SIGTERM goes on to
# all ranks, which then save. The exit code is the highest of the ranks.
set -euo pipefail

pod="$RANK"
pods="$WORLD_SIZE"
export LOCAL_WORLD_SIZE="${GPUS_PER_POD:?how many GPUs the pod has}"
export WORLD_SIZE=$((pods * GPUS_PER_POD))

ranks=()
forwarded=
trap 'forwarded=1; kill -TERM "${ranks[@]}" 2>/dev/null || true' TERM
for ((gpu = 0; gpu < GPUS_PER_POD; gpu++)); do
	RANK=$((pod * GPUS_PER_POD + gpu)) LOCAL_RANK=$gpu python -u t2i/train.py "$@" &
	ranks+=($!)
done

highest=0
for rank in "${ranks[@]}"; do
	# A signal ends `wait` before the rank has ended.
	while
		forwarded=
		code=0
		wait "$rank" || code=$?
		[ -n "$forwarded" ]
	do :; done
	if [ "$code" -gt "$highest" ]; then highest=$code; fi
done
exit "$highest"
