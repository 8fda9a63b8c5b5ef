"""Tokens a second of plain `model.generate`, a packed model against the same one dense.

    python bench/end_to_end.py [--rounds 5] [--new-tokens 64] [--dtype bfloat16] [--device cpu]

A Llama of half a billion random weights (hidden 1536, 18 layers, vocabulary 32000), pruned to 2:4 by magnitude; batch
1, greedy, interleaved rounds. Answers are compared before the clock starts. Ends with 1 unless decoding is at least
1.5 times faster and the packed weights take at most 0.60 of the dense bytes.
"""

import argparse
import sys
import time

import torch
from record import record
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekit as sk
from sparsekit.benchmarking import dense_twin, time_pair
from sparsekit.benchmarking.layers import MODEL_TOLERANCE, agree
from sparsekit.benchmarking.models import memory_summary
from sparsekit.doctor import parse_dtype
from sparsekit.report import Report

REQUIRED_SPEEDUP, REQUIRED_BYTES = 1.5, 0.60


def build(dtype: torch.dtype, device: str, num_layers: int) -> LlamaForCausalLM:
    """Return the random model; its end-of-text token is out of reach, so every run decodes as much."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=num_layers,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype=dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(config).to(device).eval()
    finally:
        torch.set_default_dtype(before)


def generate(model: nn.Module, prompt: torch.Tensor, new_tokens: int) -> torch.Tensor:
    with torch.inference_mode():
        return model.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=18, help="fewer for a quick look")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--format", default="auto", help="of the packed weights: semi24_int8, semi24_int4, ...")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    dtype = parse_dtype(options.dtype)
    assert dtype is not None
    model = build(dtype, options.device, options.layers)
    started = time.perf_counter()
    sk.sparsify(model, "2:4", method="magnitude", format=options.format)
    sparsify_seconds = time.perf_counter() - started
    twin = dense_twin(model)
    prompt = torch.randint(32_000, (1, options.prompt_length), device=options.device)
    with torch.inference_mode():
        error = agree("prefill", twin(prompt).logits, model(prompt).logits, MODEL_TOLERANCE)
    timings = time_pair(
        lambda: generate(twin, prompt, options.new_tokens),
        lambda: generate(model, prompt, options.new_tokens),
        rounds=options.rounds,
        warmup=1,
        device=options.device,
    )
    memory = memory_summary(model)
    ratio = timings.ratio("dense", "sparse")
    rows = [
        {"side": side, "tokens/s": options.new_tokens / timing.median, **timing.to_dict()}
        for side, timing in timings.timings.items()
    ]
    ok = ratio >= REQUIRED_SPEEDUP and memory["pruned weights, ratio"] <= REQUIRED_BYTES
    parameters = sum(p.numel() for p in twin.parameters())
    summary = {"speedup of generate": round(ratio, 3), "parameters": parameters, **memory}
    Report(f"generate, {options.dtype} on {options.device}, format {options.format}", rows, summary, ok=ok).print()
    result = {
        **{key: value for key, value in vars(options).items()},
        "parameters": parameters,
        "speedup": ratio,
        "logits_error": error,
        "sparsify_s": sparsify_seconds,
        **{f"{side}_{key}": value for side, t in timings.timings.items() for key, value in t.to_dict().items()},
        **{f"{side}_tokens_per_s": options.new_tokens / t.median for side, t in timings.timings.items()},
        **memory,
        "ok": ok,
    }
    record("end_to_end", result)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
