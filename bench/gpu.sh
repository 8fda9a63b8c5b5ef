#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, in one call of under 10 minutes:
#     bash bench/gpu.sh                     all there is to know, each stage with its share of the time: facts, ceilings and
#                                           probes; correctness; a short tuning; decode and prefill tables with it, and
#                                           torch.compile(mode="max-autotune"); a whole model; a training step; sliced
#                                           models beside dense ones;
#                                           compute-sanitizer
#     bash bench/gpu.sh check               one group of stages; three calls leave each more time:
#         check     facts, ceilings, probes, correctness, the GPU tests, compute-sanitizer
#         tune      the launches and kernels for each layer: writes <gpu>-table.json beside the results and copies it to
#                   kernels/sparsekit_kernels/configs/<gpu>.json, to be committed; without arguments only if none is there
#         bench     decode and prefill tables, torch.compile, a whole model, a training step, sliced models
#     bash bench/gpu.sh --dry-run           the same on the CPU, small, with stand-ins: to find slips beforehand
#     bash bench/gpu.sh nuteprune           NutePrune's table of quality, on the model of the checkout's demo; a call of its own
# Single stages have names too: probe correct sanitize pytest tune decode prefill compile e2e train structured.
# Rows are appended to ${OUT:-bench/results}/<gpu>.jsonl as they come; docs/gpu.md is made of them by bench/gpu_report.py.
# The stages of one call share a cache of measurements: what `tune` finds is what the packed layers of those after it
# run, and what it left out is measured on first use. TUNING names a folder for it that later calls can use too.
# SECONDS_IN_ALL (570) bounds the whole; COMMIT names the commit where the tree comes without .git.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/kernels:$PWD/bench${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
[ -x .venv/bin/python ] && own=.venv/bin/python || own=python3
python="${PYTHON:-$own}"  # what make set up, where there is one
total="${SECONDS_IN_ALL:-570}"
export SPARSEKIT_TUNING="${TUNING:-$(mktemp -d)}"

all=(probe correct tune decode prefill compile e2e train structured sanitize)
dry=() stages=() short=()
for word in "$@"; do
    case "$word" in
        --dry-run) dry=(--dry-run) ;;
        all) stages+=("${all[@]}") ;;
        check) stages+=(probe correct pytest sanitize) ;;
        bench) stages+=(decode prefill e2e compile train structured) ;;
        probe | correct | sanitize | pytest | tune | decode | prefill | compile | e2e | train | structured | nuteprune) stages+=("$word") ;;
        *) echo "unknown: $word" >&2 && exit 2 ;;
    esac
done
((${#stages[@]})) || stages=("${all[@]}")
((${#stages[@]} > 1)) && short=(--short) # of tuning: by itself it may take all the time there is
declare -A weight=([probe]=75 [correct]=85 [pytest]=90 [tune]=110 [decode]=100 [prefill]=70 [compile]=45 [e2e]=75 [train]=45 [structured]=60 [nuteprune]=400 [sanitize]=40)

left_weight=0
for stage in "${stages[@]}"; do ((left_weight += weight[$stage])); done

# What a stage does not use goes to those after it.
run() {
    local stage="$1" share
    share=$(((total - SECONDS) * weight[$stage] / left_weight))
    ((left_weight -= weight[$stage]))
    ((share < 10)) && echo "=== $stage: no time left" && return 1
    local inner=$((share > 60 ? share - 20 : share * 2 / 3))
    echo "=== $stage: up to $share s"
    local checked=(bench/gpu_check.py --small --workers 1 --seconds)
    case "$stage" in
        probe) timeout "$share" "$python" bench/gpu_probe.py --seconds "$inner" "${dry[@]}" ;;
        correct) timeout "$share" "$python" bench/gpu_check.py --seconds "$inner" "${dry[@]}" ;;
        tune) timeout "$share" "$python" bench/gpu_tune.py --cache "$SPARSEKIT_TUNING" --seconds "$inner" "${short[@]}" "${dry[@]}" ;;
        decode | prefill | compile) timeout "$share" "$python" bench/gpu_bench.py "$stage" --seconds "$inner" "${dry[@]}" ;;
        e2e) timeout "$share" "$python" bench/gpu_e2e.py --seconds "$inner" "${dry[@]}" ;;
        train)
            local shape=(--bf16 --hidden 2048 --layers 8 --batch 4 --length 1024 --vocab 32000 --rounds 3)
            ((${#dry[@]})) && shape=(--hidden 64 --layers 1 --batch 2 --length 16 --vocab 64 --rounds 1)
            [ -n "${OUT:-}" ] && export SPARSEKIT_RESULTS="$OUT/train_step.jsonl"
            ((${#dry[@]})) && [ -z "${OUT:-}" ] && export SPARSEKIT_RESULTS=/dev/null
            timeout "$share" "$python" bench/train_step.py "${shape[@]}"
            ;;
        structured)
            local sliced=(--cases bert_base,llama_1b --device cuda --dtype bfloat16 --round-to 64 --max-seconds 8)
            ((${#dry[@]})) && sliced=(--cases wikilm --batches 1 --new-tokens 2 --max-seconds 0.1)
            [ -n "${OUT:-}" ] && sliced+=(--json "$OUT/structured_latency.jsonl")
            ((${#dry[@]})) && [ -z "${OUT:-}" ] && sliced+=(--json /dev/null)
            timeout "$share" "$python" bench/structured_latency.py --data demo --method magnitude "${sliced[@]}"
            ;;
        nuteprune)
            local rows="${OUT:-bench/results}/nuteprune_quality.jsonl" runs=(--seeds 0,1,2)
            ((${#dry[@]})) && rows="$(mktemp)" && runs=(--methods "ours|paper" --sparsities 0.5 --steps 2)
            timeout "$share" "$python" bench/nuteprune_quality.py --data demo --json "$rows" --cases wikilm "${runs[@]}"
            ;;
        sanitize)
            if ((${#dry[@]})); then
                timeout "$share" "$python" "${checked[@]}" "$inner" "${dry[@]}" | tail -n 3
            elif ! command -v compute-sanitizer >/dev/null; then
                echo "compute-sanitizer is not installed: left out"
            elif ! timeout 60 compute-sanitizer --tool memcheck "$python" -c "import torch; torch.ones(1).cuda()" >/dev/null 2>&1; then
                echo "compute-sanitizer cannot run on this machine: left out"
            else # without the caching allocator, so that each tensor has bounds of its own
                PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$share" compute-sanitizer --tool memcheck --error-exitcode 9 \
                    "$python" "${checked[@]}" "$inner" 2>&1 | grep -v "^=\+$" | tail -n 40
            fi
            ;;
        pytest)
            local found parallel=() # the files that do more where there is a GPU
            mapfile -t found < <(grep -lE "HAS_GPU|cuda.is_available|mark.gpu" -r tests --include="test_*.py" | grep -v bench_gpu)
            "$python" -c "import xdist" 2>/dev/null && parallel=(-n 8)
            ((${#dry[@]})) && parallel=(--collect-only)
            timeout "$share" "$python" -m pytest -q "${parallel[@]}" --tb=short -rf "${found[@]}" 2>&1 | tail -n 25
            ;;
    esac
}

declare -A status
for stage in "${stages[@]}"; do
    began=$SECONDS
    run "$stage"
    status[$stage]="$? after $((SECONDS - began)) s"
done
echo "=== ends (0 is well, 124 out of time)"
failed=0
for stage in "${stages[@]}"; do
    echo "$stage: ${status[$stage]}"
    [[ "${status[$stage]}" == 0\ * ]] || failed=1
done
"$python" - <<'END' || true
import os
from pathlib import Path

from gpu_report import RESULTS, summary

for path in sorted(Path(os.environ.get("OUT") or RESULTS).glob("*.jsonl")):
    if path.stat().st_size and '"benchmark": "gpu_' in path.read_text():
        print("\n".join([path.name, *summary(path)]))
END
exit "$failed"
