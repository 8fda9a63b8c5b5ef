"""The tables: our kernels beside dense and beside every rival, for few tokens and for many.

    python bench/gpu_bench.py decode prefill          # both, layer by layer
    python bench/gpu_bench.py compile                 # torch.compile(mode="max-autotune") beside torch's own product
    python bench/gpu_bench.py decode --layers "8B o"

All that is timed for one layer and one number of tokens takes turns in one run, each as a CUDA graph over copies of its
weight larger together than the L2. Every result is compared with the dense product before it is timed. Rivals are
torch.mm and F.linear (the faster is "dense"), torch._scaled_mm in fp8, torch's own 2:4 tensor, and dense int4.
"""

import argparse
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_kernels import (
    BLOCK_FORMATS,
    FORMATS,
    INT4_GROUP,
    LAYERS,
    WAYS,
    Way,
    Weight,
    dense_linear,
    dense_mm,
    fp8_prepare,
    fp8_rows,
    fp8_tensor,
    gemlite_layer,
    int4_linear,
    int4_prepare,
    pack,
    random24,
    random_blocks,
    torch24_prepare,
)
from gpu_machine import Call, Machine, Variant, host_us, num_copies, open_machine, say, time_turns
from gpu_report import summary
from gpu_tune import compile_launches, picked
from sparsekit_kernels import spmm24_mma, tuning
from torch import Tensor

DECODE = (1, 2, 4, 8, 16, 32, 64)
PREFILL = (128, 256, 512, 1024, 2048, 4096, 8192)
DECODE_WAYS, PREFILL_WAYS = ("mma", "portable", "auto"), ("mma", "decompress", "cusparselt", "auto")
TOLERANCE = 0.02  # of the largest |y|, against float32: enough for a rival in bf16, too little for a wrong one
QUANTISED_TOLERANCE = 0.2  # rivals that round the weight on a grid of their own

Make = Callable[[Tensor], Call]


class Layer:
    """One layer: its dense weight and everything that was prepared from it, each in copies."""

    def __init__(self, name: str, table: str, machine: Machine) -> None:
        N, K = LAYERS[name]
        self.name, self.table, self.machine = name, table, machine
        self.N, self.K = machine.size(N, 64), machine.size(K, 256)
        torch.manual_seed(self.N + self.K)
        self.w = random24(self.N, self.K, torch.bfloat16, machine.device)
        self.dense = self.copies(self.w)
        self.weights: dict[str, Weight] = {}
        self.prepared: dict[tuple[str, str], list[tuple[Tensor, ...]]] = {}
        self.rivals: dict[str, list[Any]] = {}
        self.prepare()

    def copies(self, one: Any) -> list[Any]:
        """`one`, a tensor or a tuple of them, as often as it takes to be cold."""
        tensors = one if isinstance(one, tuple) else (one,)
        count = num_copies(sum(tensor.nbytes for tensor in tensors), self.machine)
        clones = [tuple(tensor.clone() for tensor in tensors) for _ in range(count - 1)]
        return [one, *(clones if isinstance(one, tuple) else (clone[0] for clone in clones))]

    def prepare(self) -> None:
        for format in (*FORMATS, *BLOCK_FORMATS):
            if format in BLOCK_FORMATS:
                w = random_blocks(self.N, self.K, *BLOCK_FORMATS[format], torch.bfloat16, self.machine.device)
            else:
                w = self.w
            weight = self.weights[format] = pack(w, format)
            for way in WAYS.values():
                wanted = (
                    way.name in (DECODE_WAYS if self.table == "decode" else PREFILL_WAYS) or format in BLOCK_FORMATS
                )
                if wanted and way.why_not(weight) is None:
                    self.prepared[way.name, format] = self.copies(way.prepare(weight))
        self.attempt("torch 2:4", lambda: [torch24_prepare(w) for w in self.dense])
        self.attempt("dense fp8", lambda: self.copies(fp8_prepare(self.w)))
        self.attempt("dense int4", lambda: self.copies(int4_prepare(self.w)))
        if importlib.util.find_spec("gemlite") is not None:
            self.attempt("gemlite", lambda: [gemlite_layer(w) for w in self.dense])

    def attempt(self, rival: str, prepare: Callable[[], list[Any]]) -> None:
        """Prepare a rival; one that this GPU or this torch lacks is left out, and said to be."""
        try:
            self.rivals[rival] = prepare()
        except (RuntimeError, NotImplementedError) as error:
            say(f"{rival} does not run {self.name}: {str(error).splitlines()[0][:160]}")

    def ours(self, x: Tensor) -> dict[tuple[str, str], tuple[Variant, Weight]]:
        """Every way of ours that is meant for this many tokens."""
        M = x.shape[0]
        found = {}
        for (name, format), copies in self.prepared.items():
            way, weight = WAYS[name], self.weights[format]
            if M > way.most_tokens:
                continue
            options = launch_options(way, weight, M)
            calls = [partial(way.linear, x, copy, weight, **options) for copy in copies]
            found[name, format] = Variant(calls, self.moved(weight.tensors, x)), weight
        return found

    def theirs(self, x: Tensor) -> dict[tuple[str, str], tuple[Variant, Weight]]:
        """The rivals, with x quantised beforehand where they want that."""
        reference = self.weights["semi24"]
        bytes_of_dense = self.moved((self.w,), x)
        found = {
            ("dense mm", "dense"): Variant([partial(dense_mm, x, w) for w in self.dense], bytes_of_dense),
            ("dense linear", "dense"): Variant([partial(dense_linear, x, w) for w in self.dense], bytes_of_dense),
        }
        if "torch 2:4" in self.rivals:
            calls = [partial(dense_linear, x, w) for w in self.rivals["torch 2:4"]]
            found["torch 2:4", "semi24"] = Variant(calls, self.moved(reference.tensors, x))
        if "dense fp8" in self.rivals:
            x_scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 448
            x8, one = (x.float() / x_scale).to(torch.float8_e4m3fn), torch.ones((), device=x.device)
            copies = self.rivals["dense fp8"]
            num_bytes = self.moved(copies[0], x)
            found["dense fp8, rows", "dense fp8"] = Variant(
                [partial(fp8_rows, x8, x_scale, w) for w in copies], num_bytes
            )
            found["dense fp8, tensor", "dense fp8"] = Variant(
                [partial(fp8_tensor, x8, one, w) for w in copies], num_bytes
            )
        if "dense int4" in self.rivals:
            copies = self.rivals["dense int4"]
            calls = [partial(int4_linear, x, w) for w in copies]
            found["dense int4 (tinygemm)", "dense int4"] = Variant(calls, self.moved(copies[0], x))
        if "gemlite" in self.rivals and x.shape[0] <= 64:  # it tunes itself for each shape, which takes its time
            num_bytes = self.N * self.K // 2 + self.N * self.K // INT4_GROUP * 4
            calls = [partial(layer, x) for layer in self.rivals["gemlite"]]
            found["dense int4 (gemlite)", "dense int4"] = Variant(calls, num_bytes)
        return {key: (variant, reference) for key, variant in found.items()}

    def moved(self, tensors: tuple[Tensor, ...], x: Tensor) -> int:
        return sum(tensor.nbytes for tensor in tensors) + x.nbytes + x.shape[0] * self.N * x.element_size()

    def usable(self, key: tuple[str, str], variant: Variant, weight: Weight, x: Tensor) -> bool:
        """Call it once and compare; what cannot run, or is wrong, is said and not timed."""
        try:
            y = variant.calls[0]()
        except (RuntimeError, NotImplementedError, ValueError, AssertionError) as error:
            if self.machine.dry_run and key[0] in WAYS:
                raise
            say(f"{key} does not run {self.name} M={x.shape[0]}: {str(error).splitlines()[0][:160]}")
            return False
        if key[0] == "dense fp8, tensor":  # its one scale is not that of the weight
            return True
        truth = x[:64].float() @ weight.dense.float().t()
        limit = (QUANTISED_TOLERANCE if key[1].startswith("dense ") else TOLERANCE) * truth.abs().max().item()
        error = (y[:64].float() - truth).abs().max().item()
        if error <= limit or self.machine.dry_run:
            return True
        say(f"WRONG {key} {self.name} M={x.shape[0]}: error {error:.3g} of {truth.abs().max().item():.3g}; not timed")
        self.machine.record(
            "gpu_wrong", {"layer": self.name, "M": x.shape[0], "way": key[0], "format": key[1], "error": error}
        )
        return False

    def measure(self, M: int, ceilings: dict[str, float]) -> None:
        """Time everything for M tokens, and record a row of each."""
        x = torch.randn(M, self.K, device=self.machine.device).bfloat16()
        both = self.theirs(x) | self.ours(x)
        usable = {key: v for key, (v, weight) in both.items() if self.usable(key, v, weight, x)}
        times = time_turns({"|".join(key): v for key, v in usable.items()}, self.machine, rounds=15 if M <= 512 else 9)
        for key, variant in usable.items():
            name, format = key
            result = times["|".join(key)]
            seconds = result.median_us / 1e6
            gb_s, tflop_s = variant.num_bytes / 1e9 / seconds, 2 * M * self.N * self.K / 1e12 / seconds
            row = {
                "table": self.table, "layer": self.name, "N": self.N, "K": self.K, "M": M,
                "way": name, "format": format,
                "median_us": result.median_us, "min_us": result.min_us, "gb_s": gb_s, "tflop_s": tflop_s,
                "share_of_copy": gb_s / ceilings["copy_gb_s"], "share_of_bf16": tflop_s / ceilings["bf16_tflop_s"],
                "rounds": len(result.seconds),
            }  # fmt: skip
            self.machine.record("gpu_bench", row)
        dense = min(times[name].median_us for name in times if name.endswith("|dense"))
        cells = [f"{name} {format.removeprefix('semi24_')} {dense / times[f'{name}|{format}'].median_us:.2f}"
                 for name, format in usable if format != "dense"]  # fmt: skip
        say(f"{self.name:12} M={M:<5} dense {dense:9.2f} us; times dense: {', '.join(cells)}")

    def host_times(self) -> None:
        """Record the host's microseconds of one call, for every way, at one token."""
        x = torch.randn(1, self.K, device=self.machine.device).bfloat16()
        for source, (name, format), (variant, _) in [
            *(("ours", key, value) for key, value in self.ours(x).items()),
            *(("theirs", key, value) for key, value in self.theirs(x).items()),
        ]:
            try:
                us = host_us(variant.calls[0], self.machine)
            except (RuntimeError, NotImplementedError) as error:
                say(f"{name} {format}: {str(error).splitlines()[0][:120]}")
                continue
            self.machine.record("gpu_host", {"way": name, "format": format, "source": source, "host_us": us})
            say(f"host time of a call: {name:22} {format:20} {us:7.1f} us")


def launch_options(way: Way, weight: Weight, M: int) -> dict[str, Any]:
    """The tuned launch of the fragment kernel, where the table has one."""
    if way.name != "mma":
        return {}
    found = tuning.lookup(tuning.key(weight.format, weight.dtype, weight.N, weight.K, M), weight.dense.device)
    config = found[0]["mma"].config if found is not None and "mma" in found[0] else {}
    return {"config": spmm24_mma.Config(**config)} if config else {}  # type: ignore[arg-type]


def ceilings_of(machine: Machine) -> dict[str, float]:
    from gpu_probe import ceilings

    row = ceilings(machine)
    machine.record("gpu_probe", row)
    return row


def compile_ahead(table: str, layers: list[str], machine: Machine) -> None:
    """Compile what the table will run, in several processes: the fragment kernels, and those of blocks for each K."""
    tokens = DECODE if table == "decode" else PREFILL
    shapes = [LAYERS[name] for name in layers]
    workers = []
    if not machine.dry_run:
        for K, side in itertools.product(sorted({K for _, K in shapes}), (64, 128)):
            command = [sys.executable, __file__, table, "--seconds", "150", "--blocks", str(K), str(side)]
            workers.append(subprocess.Popen(command))
    compile_launches(picked(shapes, [M for M in tokens if M <= WAYS["mma"].most_tokens], machine), machine)
    for worker in workers:
        try:
            worker.wait(timeout=max(min(machine.seconds_left(), 150), 1))
        except subprocess.TimeoutExpired:
            worker.kill()


def run_blocks_once(table: str, K: int, side: int, machine: Machine) -> None:
    """Call the block kernel on a low weight, so that its compiled code lies in Triton's cache."""
    weight = pack(
        random_blocks(4 * side, K, (side, side), 0.25, torch.bfloat16, machine.device), f"block {side}x{side} 75%"
    )
    prepared = WAYS["block"].prepare(weight)
    for M in DECODE if table == "decode" else PREFILL:
        WAYS["block"].linear(torch.randn(M, K, device=machine.device).bfloat16(), prepared, weight)


def compile_baseline(machine: Machine, layers: list[str]) -> None:
    """Record how torch.compile(mode="max-autotune") stands against the faster of torch.mm and F.linear."""
    order = [(M, name) for M in (1, 2048, 16, 64, 8192) for name in layers]
    slowest = 0.0
    for M, name in order[: machine.size(len(order), 1)]:
        if machine.is_late(f"torch.compile of {name} M={M}", needed=machine.size(1, 0) * (slowest + 5)):
            return
        N, K = (machine.size(size, 64) for size in LAYERS[name])
        w = torch.randn(N, K, device=machine.device).bfloat16()
        dense = [w, *(w.clone() for _ in range(num_copies(w.nbytes, machine) - 1))]
        x = torch.randn(M, K, device=machine.device).bfloat16()
        torch._dynamo.reset()
        mode = "default" if machine.dry_run else "max-autotune-no-cudagraphs"  # the graph is ours
        compiled = torch.compile(dense_linear, mode=mode, dynamic=False, fullgraph=True)
        before = machine.seconds_left()
        with torch.inference_mode():
            compiled(x, dense[0])
            slowest = max(slowest, before - machine.seconds_left())
            calls = {"mm": dense_mm, "linear": dense_linear, "compiled": compiled}
            variants = {key: Variant([partial(call, x, w) for w in dense], w.nbytes) for key, call in calls.items()}
            times = time_turns(variants, machine, rounds=9)
        own = min(times["mm"].median_us, times["linear"].median_us)
        row = {"layer": name, "N": N, "K": K, "M": M, "compiled_us": times["compiled"].median_us, "dense_us": own}
        machine.record("gpu_compile", row | {"compiled_over_dense": times["compiled"].median_us / own})
        say(f"{name:12} M={M:<5} compiled {times['compiled'].median_us:9.2f} us, torch {own:9.2f} us")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("tables", nargs="*", help="decode, prefill, compile; default: the first two")
    parser.add_argument("--layers", nargs="*", default=list(LAYERS), choices=list(LAYERS))
    parser.add_argument("--blocks", nargs=2, type=int, metavar=("K", "SIDE"), help="of a worker: kernels to compile")
    # By itself: shipped tables and rules, and nothing is measured on the way. From gpu.sh: what `tune` has found.
    os.environ.setdefault("SPARSEKIT_TUNING", "off")
    machine, options = open_machine(__doc__.splitlines()[0], parser)
    if machine.dry_run:
        import gpu_dry

        gpu_dry.install()
        options.layers = options.layers[:1]
    tables = options.tables or ["decode", "prefill"]
    if unknown := set(tables) - {"decode", "prefill", "compile"}:
        parser.error(f"no table is called {', '.join(sorted(unknown))}: decode, prefill or compile")
    if options.blocks:
        run_blocks_once(tables[0], *options.blocks, machine)
        return 0
    ceilings = ceilings_of(machine) if tables != ["compile"] else {}
    for table in tables:
        if table == "compile":
            compile_baseline(machine, options.layers)
            continue
        tokens = DECODE if table == "decode" else PREFILL
        compile_ahead(table, options.layers, machine)
        if importlib.util.find_spec("gemlite") is None:
            say("gemlite is not installed: the dense int4 kernel is torch's own, tinygemm")
        for name in options.layers:
            if machine.is_late(f"{table} {name}", needed=machine.size(8, 0)):
                continue
            layer = Layer(name, table, machine)
            if table == "decode" and name == "8B o":
                layer.host_times()
            for M in tokens[: machine.size(len(tokens), 2)]:
                if not machine.is_late(f"{table} {name} M={M}", needed=machine.size(3, 0)):
                    layer.measure(M, ceilings)
            del layer
            machine.free_memory()
    for line in summary(machine.out_dir / f"{machine.slug}.jsonl", since=machine.started):
        say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
