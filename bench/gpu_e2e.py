"""A whole model of the shape of Llama-3-8B: tokens a second and prompt latency, dense against packed.

    python bench/gpu_e2e.py                      # decode in CUDA graphs, prefill, then torch.compile as time permits
    python bench/gpu_e2e.py --formats semi24 semi24_int4

Random weights that obey 2:4; batch 1; static cache. `lm_head` stays dense bf16 in every variant. Decode is timed in two
ways: one step, captured as a CUDA graph as it is; and the step under torch.compile(mode="reduce-overhead",
fullgraph=True), variant after variant while there is time. Variants take turns within each way.
"""

import argparse
import copy
import os
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from gpu_kernels import FORMATS, LAYERS, random24
from gpu_machine import Call, Machine, capture, open_machine, say, stopwatch
from gpu_report import HOWS
from gpu_tune import compile_launches, picked
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import sparsekit as sk

CACHE_LENGTH, POSITION = 1024, 256
PROMPTS = (512, 2048, 8192)
STEPS = 32  # of decoding, in one sample


def build(machine: Machine) -> LlamaForCausalLM:
    """Return the dense model, its linear layers but `lm_head` pruned to 2:4."""
    config = LlamaConfig(
        vocab_size=machine.size(128_256, 512),
        hidden_size=machine.size(4096, 64),
        intermediate_size=machine.size(14336, 128),
        num_hidden_layers=machine.size(32, 2),
        num_attention_heads=machine.size(32, 4),
        num_key_value_heads=machine.size(8, 2),
        max_position_embeddings=16384,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with machine.device:
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            N, K = layer.weight.shape
            layer.weight.data.copy_(random24(N, K, torch.bfloat16, machine.device, zeros=0.0) * K**-0.5)
    return model.requires_grad_(False)


def variants_of(dense: nn.Module, formats: list[str], machine: Machine) -> dict[str, nn.Module]:
    """Return the dense model and a packed copy in each format that can be packed here."""
    models = {"dense": dense}
    for format in formats:
        started = time.monotonic()
        model = copy.deepcopy(dense)
        with warnings.catch_warnings():
            warnings.simplefilter("always" if not machine.dry_run else "ignore")
            sk.pack_(model, format=format, fuse=True)
        models[format] = model
        backends = {layer.backend for layer in model.modules() if isinstance(layer, sk.SparseLinear)}
        say(f"packed in {format} for {', '.join(map(str, backends))} in {time.monotonic() - started:.1f} s")
        machine.free_memory()
    return models


def weights_gb(model: nn.Module) -> float:
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values()) / 1e9


class Decoder:
    """One decode step of a model on a static cache: token and position are tensors that stay where they are."""

    def __init__(self, model: nn.Module, machine: Machine) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=machine.size(CACHE_LENGTH, 32))
        first = machine.size(POSITION, 8)
        self.token = torch.full((1, 1), 7, device=machine.device)
        self.position = torch.tensor([[first]], device=machine.device)
        self.forward: Callable[..., Any] = model
        prompt = torch.arange(first, device=machine.device)[None] % 97
        with torch.inference_mode():
            model(
                input_ids=prompt,
                position_ids=torch.arange(first, device=machine.device)[None],
                past_key_values=self.cache,
            )

    def step(self) -> Tensor:
        """Decode one token, greedily; the next step reads it. Returns the logits."""
        logits = self.forward(
            input_ids=self.token, position_ids=self.position, past_key_values=self.cache, use_cache=True
        ).logits[:, -1]
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits


def time_decode(runs: dict[str, Call], how: str, models: dict[str, nn.Module], machine: Machine) -> None:
    """Time decode steps of every variant in turns, and record tokens a second."""
    clock = stopwatch(machine.device)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    steps = machine.size(STEPS, 1)
    for turn in range(machine.size(-2, 0), machine.size(9, 1)):
        for name in runs if turn % 2 else reversed(runs):
            seconds = clock(lambda run=runs[name]: [run() for _ in range(steps)]) / steps
            if turn >= 0:
                samples[name].append(seconds)
    dense = median(samples["dense"]) if "dense" in samples else None
    for name, seconds in samples.items():
        middle = median(seconds)
        row = {"format": name, "how": how, "tokens_per_s": 1 / middle, "median_ms": middle * 1e3}
        row |= {
            "min_ms": min(seconds) * 1e3,
            "weights_gb": weights_gb(models[name]),
            "steps": steps,
            "lm_head": "dense bf16",
        }
        machine.record("gpu_e2e_decode", row)
        ratio = f", {dense / middle:.2f} times dense" if dense else ""
        say(f"decode, {how}: {name:12} {1 / middle:8.1f} tokens/s{ratio}, weights {row['weights_gb']:.2f} GB")


def decode_in_graphs(models: dict[str, nn.Module], machine: Machine) -> None:
    """Capture one eager step of every variant as a CUDA graph, and time the replays."""
    decoders = {name: Decoder(model, machine) for name, model in models.items()}
    runs: dict[str, Call] = {}
    with torch.inference_mode():
        reference = decoders["dense"].step().float()
        for name, decoder in decoders.items():
            logits = reference if name == "dense" else decoder.step().float()
            error = (logits - reference).abs().max().item() / reference.abs().max().item()
            say(f"logits of {name}: largest difference to dense {error:.3f} of the largest logit")
            decoder.token.fill_(7)
            runs[name] = capture([decoder.step], machine.device)
        time_decode(runs, HOWS[1], models, machine)


def decode_compiled(models: dict[str, nn.Module], machine: Machine) -> None:
    """Time the step under torch.compile, which makes its own CUDA graphs; one variant after the other compiles."""
    runs: dict[str, Call] = {}
    slowest = machine.size(40, 0)
    with torch.inference_mode():
        for name, model in models.items():
            if machine.is_late(f"torch.compile of {name}", needed=1.3 * slowest + machine.size(10, 0)):
                continue
            decoder, started = Decoder(model, machine), time.monotonic()
            options: dict[str, Any] = {"backend": "eager"} if machine.dry_run else {"mode": "reduce-overhead"}
            decoder.forward = torch.compile(model, fullgraph=True, dynamic=False, **options)
            for _ in range(3):
                torch.compiler.cudagraph_mark_step_begin()
                decoder.step()
            slowest = max(slowest, time.monotonic() - started) if not machine.dry_run else 0
            say(f"compiled {name} in {time.monotonic() - started:.1f} s")
            runs[name] = marked(decoder.step)
    if runs:
        with torch.inference_mode():
            time_decode(runs, HOWS[0], models, machine)


def marked(step: Call) -> Call:
    def run() -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return step()

    return run


def prefill(models: dict[str, nn.Module], machine: Machine) -> None:
    """Time a whole prompt, without a cache, and note the peak of memory with this variant's weights alone."""
    clock = stopwatch(machine.device)
    for length in PROMPTS if not machine.dry_run else (16,):
        if machine.is_late(f"prefill of {length} tokens", needed=machine.size(10, 0)):
            return
        prompt = torch.arange(length, device=machine.device)[None] % 97
        samples: dict[str, list[float]] = {name: [] for name in models}
        peaks: dict[str, float] = {}
        with torch.inference_mode():
            for turn in range(machine.size(-2, 0), machine.size(7, 1)):
                for name, model in models.items() if turn % 2 else reversed(models.items()):
                    before = reset_peak(machine)
                    seconds = clock(partial(model, input_ids=prompt, use_cache=False, logits_to_keep=1))
                    if turn >= 0:
                        samples[name].append(seconds)
                        peaks[name] = peak(machine) - before + weights_gb(model)
        for name, seconds in samples.items():
            row = {"format": name, "M": length, "median_ms": median(seconds) * 1e3, "min_ms": min(seconds) * 1e3}
            machine.record("gpu_e2e_prefill", row | {"peak_gb": peaks[name]})
            ratio = median(samples["dense"]) / median(seconds)
            say(
                f"prefill {length:5}: {name:12} {row['median_ms']:8.2f} ms, {ratio:.2f} times dense, "
                f"peak {peaks[name]:.2f} GB"
            )


def reset_peak(machine: Machine) -> float:
    if machine.device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / 1e9


def peak(machine: Machine) -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if machine.device.type == "cuda" else 0.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--no-compile", action="store_true", help="only the CUDA graphs of the eager step")
    # By itself: shipped tables and rules, and nothing is measured on the way. From gpu.sh: what `tune` has found.
    os.environ.setdefault("SPARSEKIT_TUNING", "off")
    machine, options = open_machine(__doc__.splitlines()[0], parser)
    if not machine.dry_run:
        shapes = [shape for name, shape in LAYERS.items() if name.startswith("8B")]
        compile_launches(picked(shapes, (1, 256), machine), machine)
    dense = build(machine)
    say(f"dense model: {weights_gb(dense):.2f} GB")
    models = variants_of(dense, options.formats, machine)
    parts = [decode_in_graphs, prefill] if options.no_compile else [decode_in_graphs, prefill, decode_compiled]
    failed = []
    for part in parts:
        try:
            part(models, machine)
        except (RuntimeError, NotImplementedError) as error:  # what one part cannot do must not cost the others
            failed.append(part.__name__)
            say(f"{part.__name__} failed: {type(error).__name__}: {str(error)[:2000]}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
