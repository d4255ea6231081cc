#!/usr/bin/env bash
# Train and test one config end to end, given its data.
#
#   dev/reproduce.sh CONFIG [options of train]
#   GPUS=8 dev/reproduce.sh era_retinanet_r101_r50 --amp
#
# CONFIG is the path or base name of a config. A teacher whose weights are to
# be trained first (docs/model_zoo.md) is trained by its own config. Run it
# again after an interruption: it goes on from the last checkpoint.
set -euo pipefail
script=$(realpath "$0")
if [ $# -lt 1 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$script"
    exit 2
fi
given=$1
if [ -e "$given" ]; then
    given=$(realpath "$given")
fi
name=$(basename "$given" .py)
shift
cd "$(dirname "$script")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

# The config's file, and the teacher's where its weights are not there yet.
mapfile -t found < <("$python" - "$given" <<'PYTHON'
import contextlib
import sys
from pathlib import Path

from mmengine.config import Config

from era_mm.engine.preflight import find_config

with contextlib.redirect_stdout(sys.stderr):
    file = find_config(sys.argv[1])
    teacher = Config.fromfile(file).get('model', {}).get('teacher') or {}
print(file)
weights = teacher.get('checkpoint')
if weights and '://' not in weights and not Path(weights).exists():
    print(teacher['config'])
PYTHON
)
if [ ${#found[@]} -eq 0 ]; then
    exit 1
fi
config=${found[0]}
if [ ${#found[@]} -gt 1 ]; then
    echo "$name: its teacher is trained first, ${found[1]}"
    "$script" "${found[1]}"
fi

run() {
    local command=$1
    shift
    if [ "${GPUS:-1}" -gt 1 ]; then
        "$python" -m torch.distributed.run --nproc_per_node="$GPUS" \
            "tools/$command.py" "$@" --launcher pytorch
    else
        "$python" "tools/$command.py" "$@"
    fi
}

work_dir=work_dirs/$name
resume=()
if [ -e "$work_dir/last_checkpoint" ]; then
    resume=(--resume)
fi
run train "$config" --work-dir "$work_dir" "${resume[@]}" "$@"
run test "$config" "$(cat "$work_dir/last_checkpoint")" \
    --work-dir "$work_dir/test"
