"""Tokens a second of plain `model.generate`: q, k, v and gate, up in one launch each, against the layers apart.

    python bench/fused.py [--rounds 7] [--new-tokens 32] [--layers 18] [--dtype bfloat16] [--device cpu]

The model of `end_to_end.py`, pruned to 2:4 by magnitude and packed. Logits and answers of both sides are compared
first; on the CPU they are the same bits. Batch 1, greedy, interleaved rounds. Ends with 1 if fusing loses 2 %.
"""

import argparse
import copy
import sys

import torch
from end_to_end import build, generate
from record import record

import sparsekit as sk
from sparsekit.benchmarking import compare
from sparsekit.benchmarking.layers import MODEL_TOLERANCE, agree
from sparsekit.doctor import parse_dtype
from sparsekit.nn import sparse_layers
from sparsekit.report import Report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=18, help="fewer for a quick look")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype = parse_dtype(options.dtype)
    assert dtype is not None
    apart = sk.sparsify(build(dtype, options.device, options.layers), "2:4", method="magnitude")
    fused = sk.pack_(copy.deepcopy(apart), fuse=True)
    layers = sparse_layers(fused).values()
    launches = len(layers) - sum(len(group.members) - 1 for group in {layer.group for layer in layers} if group)
    prompt = torch.randint(32_000, (1, 8), device=options.device)
    with torch.inference_mode():
        error = agree("prefill", apart(prompt).logits, fused(prompt).logits, MODEL_TOLERANCE)
    same_answers = torch.equal(*(generate(model, prompt, options.new_tokens) for model in (apart, fused)))
    timings = compare(
        {
            "apart": lambda: generate(apart, prompt, options.new_tokens),
            "fused": lambda: generate(fused, prompt, options.new_tokens),
        },
        rounds=options.rounds,
        warmup=1,
        device=options.device,
    )
    ratio = timings["apart"].min / timings["fused"].min
    rows = [
        {"side": side, "tokens/s": options.new_tokens / timing.min, **timing.to_dict()}
        for side, timing in timings.timings.items()
    ]
    ok = ratio > 0.98
    summary = {
        "speedup of fusing, fastest rounds": round(ratio, 3),
        "launches a token": f"{launches} instead of {len(layers)}",
        "error of the logits": error,
        "same answers": same_answers,
    }
    Report(f"generate, {options.dtype} on {options.device}", rows, summary, ok=ok).print()
    result = {
        **vars(options),
        "speedup": ratio,
        "noise": timings.noise,
        "logits_error": error,
        "same_answers": same_answers,
        "launches": launches,
        "launches_apart": len(layers),
        **{f"{side}_{key}": value for side, t in timings.timings.items() for key, value in t.to_dict().items()},
        **{f"{side}_tokens_per_s": options.new_tokens / t.min for side, t in timings.timings.items()},
        "ok": ok,
    }
    record("fused", result)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
