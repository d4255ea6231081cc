#!/usr/bin/env bash
# What only a GPU can show.
#
#   dev/gpu.sh measure [FOLDER]    the tests, and what a step costs
#   dev/gpu.sh suite [OPTION ...]  trainings of the digit scenes
#
# `measure` writes to FOLDER, by default results/gpu; its processes start
# together and take turns. `suite` is `era_mm suite` (docs/suite.md) for MINUTES
# (8); called again, it goes on. It needs the digit scenes (python
# tools/make_digit_scenes.py). `python -m dev.gpu_page` makes docs/gpu.md.
set -euo pipefail
script=$(realpath "$0")
command=${1:-}
if [ "$command" != suite ] && { [ "$command" != measure ] || [ $# -gt 2 ]; }
then
    sed -n '2,10s/^# \{0,1\}//p' "$script" >&2
    exit 2
fi
shift
out=results/gpu
if [ "$command" = measure ] && [ $# -gt 0 ]; then
    out=$(realpath -m "$1")
fi
cd "$(dirname "$script")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONUNBUFFERED=1
# torch's profiler writes to the screen.
export KINETO_LOG_LEVEL=99

# background NAME COMMAND...: what fails is named at the end; the rest is run
# all the same.
names=() pids=()
background() {
    local name=$1
    shift
    "$@" > "$out/$name.log" 2>&1 &
    names+=("$name") pids+=($!)
}

stage() {
    local name="$1_$2_b$3_$4" amp=()
    [ "$4" = full ] || amp=(--amp)
    background "$name" "$python" -m dev.gpu_benchmark "$1" "$2" \
        --batch-size "$3" "${amp[@]}" \
        --out "$out/$name.json" --lock "$lock"
}

measure() {
    local lock config batch precision name failed=() i
    mkdir -p "$out"
    lock=$(mktemp)
    background tests flock "$lock" "$python" -m pytest -q -m gpu tests/test_gpu.py
    # In the order in which they ask for the GPU.
    sleep 1
    for batch in 2 8; do
        for config in era_retinanet_r101_r50 era_gfl_r101_r50 \
            era_faster_rcnn_r101_r50
        do
            for precision in full mixed; do
                stage settings "$config" "$batch" "$precision"
            done
        done
    done
    stage profile era_retinanet_r101_r50 2 full
    stage profile era_faster_rcnn_r101_r50 2 full
    stage profile era_retinanet_r101_r50 8 mixed
    stage variants era_retinanet_r101_r50 2 full
    stage variants era_retinanet_r101_r50 8 mixed
    # Compiling takes a minute, in which the others would wait. What failed is
    # asked below.
    wait "${pids[@]}" || true
    stage compiled era_retinanet_r101_r50 8 mixed
    for i in "${!pids[@]}"; do
        wait "${pids[$i]}" || failed+=("${names[$i]}")
    done
    rm -f "$lock"
    tail -n 1 "$out/tests.log" > "$out/tests.txt"
    for name in "${names[@]}"; do
        echo "== $name"
        tail -n 12 "$out/$name.log"
    done
    if [ "${#failed[@]}" -gt 0 ]; then
        echo "failed: ${failed[*]}" >&2
        return 1
    fi
}

# Being stopped when the time is over is no failure.
suite() {
    local status=0 mps=
    # Without it the processes of different trainings take turns on the GPU.
    if command -v nvidia-cuda-mps-control > /dev/null; then
        nvidia-cuda-mps-control -d && mps=1
    fi
    timeout --signal=INT "${MINUTES:-8}m" \
        "$python" -m era_mm suite suites/digit_scenes.py "$@" || status=$?
    [ -z "$mps" ] || echo quit | nvidia-cuda-mps-control
    [ "$status" = 124 ] || return "$status"
}

"$command" "$@"
