#!/usr/bin/env bash
# What only a GPU can show: the tests, what a step costs, and the suite.
#
#   dev/gpu.sh [FOLDER]            results go there; default results/gpu
#   JOBS=12 MINUTES=8 dev/gpu.sh   trainings at a time, and for how long
#
# The suite needs the digit scenes (python tools/make_digit_scenes.py); it is
# stopped when its time is over, and goes on from there when called again.
set -euo pipefail
script=$(realpath "$0")
if [ "${1:-}" = -h ] || [ $# -gt 1 ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$script"
    exit 2
fi
out=$(realpath -m "${1:-$(dirname "$script")/../results/gpu}")
cd "$(dirname "$script")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
mkdir -p "$out"

failed=()

# step NAME COMMAND...: what fails is told at the end; the rest is run all the
# same, as the machine may not come back.
step() {
    local name=$1
    shift
    if ! "$@" 2>&1 | tee "$out/$name.txt"; then
        failed+=("$name")
    fi
}

# For a while only: being stopped when the time is over is no failure.
for_a_while() {
    local status=0
    timeout --signal=INT "${MINUTES:-8}m" "$@" || status=$?
    [ "$status" = 124 ] || return "$status"
}

step tests "$python" -m pytest -q -m gpu

# The shapes of COCO; weights and images are random.
for config in era_retinanet_r101_r50 era_faster_rcnn_r101_r50 era_gfl_r101_r50
do
    for batch in 2 8; do
        for amp in '' --amp; do
            name=benchmark_${config}_b${batch}${amp:+_amp}
            # shellcheck disable=SC2086
            step "$name" "$python" -m era_mm benchmark "$config" \
                --device cuda --batch-size "$batch" --size 800 1333 $amp \
                --out "$out/$name.json"
        done
    done
done

step suite for_a_while "$python" -m era_mm suite suites/digit_scenes.py \
    --jobs "${JOBS:-12}" --results "$out" --page "$out/results.md"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
