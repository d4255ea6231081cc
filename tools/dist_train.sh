#!/usr/bin/env bash
# Usage: tools/dist_train.sh CONFIG GPUS [...]
# Several machines: set NNODES, NODE_RANK, MASTER_ADDR and PORT on each.
# Without a GPU the same command starts that many CPU ranks.
set -euo pipefail

if [ "$#" -lt 2 ]; then
    sed -n '2,4s/^# //p' "$0" >&2
    exit 2
fi

positional=("${@:1:1}")
gpus=${*:2:1}

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node-rank="${NODE_RANK:-0}" \
    --nproc-per-node="$gpus" \
    --master-addr="${MASTER_ADDR:-127.0.0.1}" \
    --master-port="${PORT:-29500}" \
    "$(dirname "$0")/train.py" "${positional[@]}" \
    --launcher pytorch "${@:3}"
