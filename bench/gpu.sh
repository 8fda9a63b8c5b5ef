#!/usr/bin/env bash
# GPU tests, then the measurements, in one call of under 10 minutes on a machine with an NVIDIA GPU:
#     bash bench/gpu.sh            rows go to ${OUT:-bench/results}/<gpu>.jsonl
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python="${PYTHON:-python3}"

"$python" -c "import xdist" 2>/dev/null && parallel="-n 8" || parallel=""
# shellcheck disable=SC2086
timeout 200 "$python" -m pytest -q $parallel --tb=short -rf tests/kernels/test_spmm24.py tests/kernels/test_cusparselt.py
tests=$?
# A failing test ends the run only after the numbers: the script checks its own answers and stops at a wrong one.
timeout 380 "$python" bench/gpu_spmm24.py --seconds 300 "$@"
bench=$?
echo "tests: $tests, bench: $bench (0 is well)"
exit $((tests || bench))
