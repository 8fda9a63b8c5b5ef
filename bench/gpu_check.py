"""Every kernel against float64 on the GPU: random and hostile inputs, every option, twice the same bits.

    python bench/gpu_check.py                        # all that fits into --seconds, small shapes first
    python bench/gpu_check.py --small --workers 1    # a minute's worth, as under compute-sanitizer

The work is dealt to processes, since most of it is compiling kernels.

A kernel passes where it is at most twice as far from float64 as torch's own dense product in the same dtype. Memory
that a kernel should write is poisoned with NaN. All failures are listed; the exit status is 1 if there is one.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_kernels import BLOCK_FORMATS, FORMATS, WAYS, Prepared, Way, Weight, mma_kernel, pack, random24, random_blocks
from gpu_machine import Machine, capture, open_machine, say
from kd_loss import cases as kd_cases
from kd_loss import wrong as kd_wrong
from sparsekit_kernels import compress24, cusparselt, fragments24, layout24, layout_block, spmm24, spmm24_mma
from sparsekit_kernels.quant import dequantize24
from sparsekit_kernels.quantize_tokens import quantize_tokens
from torch import Tensor

SMALL = ((16, 32), (17, 8), (63, 257), (48, 80), (130, 1000))
LARGE = ((4096, 4096), (1024, 14336), (6144, 4096))
TOKENS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 1000)
SMALL_TOKENS = (1, 8, 17, 65)
MOST_LISTED = 25


@dataclass
class Tally:
    """What was tried, and what was wrong."""

    tried: dict[str, int] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, family: str, case: str, trouble: str | None, ratio: float = 0.0) -> None:
        self.tried[family] = self.tried.get(family, 0) + 1
        self.worst[family] = max(self.worst.get(family, 0.0), ratio)
        if trouble:
            self.failures.append(f"{family} {case}: {trouble}")
            if len(self.failures) <= MOST_LISTED:
                say(f"WRONG {self.failures[-1]}")

    def attempt(self, family: str, case: str, check: Callable[[], tuple[str | None, float]]) -> None:
        """Run one check; an error of a kernel is a failure like any other."""
        try:
            trouble, ratio = check()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            trouble, ratio = f"{type(error).__name__}: {str(error)[:300]}", 0.0
        self.add(family, case, trouble, ratio)


def reference(x: Tensor, weight: Tensor, options: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The product in `dtype` on the device: float64 is the truth, x's own dtype what torch would give."""
    bias, residual = options.get("bias"), options.get("residual")
    y = F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    if options.get("activation") == "silu_mul":
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.to(dtype)


def judge(out: Tensor, again: Tensor, x: Tensor, weight: Tensor, options: dict[str, Any]) -> tuple[str | None, float]:
    """Return what is wrong with a result, or None, and its largest error over that of torch in the same dtype."""
    truth, own = (reference(x, weight, options, dtype) for dtype in (torch.float64, x.dtype))
    if out.shape != truth.shape or out.dtype != x.dtype:
        return f"{out.dtype} {tuple(out.shape)}, expected {x.dtype} {tuple(truth.shape)}", 0.0
    if not out.is_contiguous():
        return "not contiguous", 0.0
    if lost := int((~out.isfinite() & own.isfinite()).sum()):
        return f"NaN or infinity in {lost} of {out.numel()} places", 0.0
    if not torch.equal(_bytes(out), _bytes(again)):
        return f"two calls differ in {int((out != again).sum())} places", 0.0
    if not truth.numel():
        return None, 0.0
    error, own_error = ((y.double() - truth).abs().max().item() for y in (out, own))
    limit = 2 * own_error + 1e-5 * truth.abs().max().item()
    trouble = None if error <= limit else f"error {error:.3g}, dense {own_error:.3g}, allowed {limit:.3g}"
    comparable = own_error > 1e-6 * limit and error < float("inf")
    return trouble, error / own_error if comparable else 0.0


def run_way(tally: Tally, way: Way, weight: Weight, prepared: Prepared, x: Tensor, case: str, **options: Any) -> None:
    """Check one call of a way."""

    def check() -> tuple[str | None, float]:
        out, again = (way.linear(x, prepared, weight, **options) for _ in range(2))
        math_options = {name: value for name, value in options.items() if name != "config"}
        return judge(out, again, x, weight.dense, math_options)

    tally.attempt(family_of(way, weight), case, check)


def family_of(way: Way, weight: Weight) -> str:
    return f"{way.name} {weight.format.split()[0]}"


def inputs(M: int, K: int, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """x as models have it, and as they should not: strided, misaligned, transposed, zero, cancelling, tiny."""
    x = torch.randn(M, K, device=device).to(dtype)
    yield "random", x
    yield "strided rows", torch.randn(M, K + 24, device=device).to(dtype)[:, 8 : 8 + K]
    yield "odd stride", torch.randn(M, K + 3, device=device).to(dtype)[:, 1 : 1 + K]
    yield "transposed", torch.randn(K, M, device=device).to(dtype).t()
    yield "leading dimensions", x.view(1, M, 1, K)
    yield "zeros", torch.zeros_like(x)
    yield "cancelling", torch.where(torch.arange(K, device=device) % 2 == 0, 1.0, -1.0).to(dtype).expand(M, K) * 1000
    yield "tiny", x * 1e-6
    yield "one hot", F.one_hot(torch.arange(M, device=device) * 37 % K, K).to(dtype)


def check_format(tally: Tally, unit: "Unit", tokens: tuple[int, ...], machine: Machine) -> None:
    """All ways to run one format on one shape: every number of tokens, then every kind of input and option."""
    N, K, dtype, device = unit.N, unit.K, unit.dtype, machine.device
    torch.manual_seed(N * 31 + K)
    if unit.work == "blocks":
        blocks = [(16, 32), *dict.fromkeys(block for block, _ in BLOCK_FORMATS.values())]
        weights = [block_weight(N, K, block, dtype, device) for block in blocks]
    else:
        weights = [pack(random24(N, K, dtype, device), unit.work)]
    for weight, way in itertools.product(weights, WAYS.values()):
        if way.why_not(weight) is not None or machine.is_late(f"{way.name} {unit}"):
            continue
        label = f"{unit} {tuple(weight.tensors[0].shape)}"
        try:
            prepared = way.prepare(weight)
        except (RuntimeError, ValueError) as error:
            tally.add(family_of(way, weight), f"{label} prepare", f"{type(error).__name__}: {error}")
            continue
        bias = torch.randn(N, device=device).to(dtype)
        for M in tokens:
            x = torch.randn(M, K, device=device).to(dtype)
            run_way(tally, way, weight, prepared, x, f"{label} M={M}")
        for M in (1, 5, 20) if way.most_tokens <= 256 else (5, 100):
            for kind, x in inputs(M, K, dtype, device):
                run_way(tally, way, weight, prepared, x, f"{label} M={M} {kind}, bias", bias=bias)
        x = torch.randn(5, K, device=device).to(dtype)
        if way.name in ("mma", "block"):
            residual = torch.randn(5, N, device=device).to(dtype)
            run_way(tally, way, weight, prepared, x, f"{label} residual", residual=residual)
            run_way(tally, way, weight, prepared, x, f"{label} bias, residual", bias=bias, residual=residual)
        if way.name == "mma":
            check_mma(tally, way, weight, prepared, x, label)


def block_weight(N: int, K: int, block: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Weight:
    """A block-sparse weight of any block, under the name of a format that the block kernel runs."""
    w_NK = random_blocks(N, K, block, 0.4, dtype, device)
    return Weight(next(iter(BLOCK_FORMATS)), w_NK, layout_block.compress_block(w_NK, block), dtype)


def integer_product(weight: Weight, prepared: Prepared, x: Tensor) -> tuple[str | None, float]:
    """int8 tokens times int8 weights: the sums are exact, so only the last rounding may differ from float64."""
    values, meta, scales = weight.tensors
    q, x_scales = quantize_tokens(x)
    rounded = (x.double() / x_scales.double()[:, None]).round().clamp(-127, 127)
    if (q.double() - rounded).abs().max() > 1 or (q.double() * x_scales[:, None] - x).abs().max() > x_scales.max():
        return "tokens are not rounded to nearest", 0.0
    dense = layout24.decompress24(dequantize24(values, scales, weight.format, weight.K, torch.float32), meta, weight.K)
    truth = F.linear(q.double() * x_scales.double()[:, None], dense.double())
    y = spmm24_mma.spmm24_int8(q, *prepared, weight.N, x_scales=x_scales, out_dtype=x.dtype)
    error = ((y.double() - truth).abs() / truth.abs().clamp_min(1e-3)).max().item()
    limit = torch.finfo(x.dtype).eps
    return None if error <= limit else f"relative error {error:.3g}, allowed {limit:.3g}", error / limit


def check_mma(tally: Tally, way: Way, weight: Weight, prepared: Prepared, x: Tensor, label: str) -> None:
    """What only the fragment kernels have: split K by name, gated weights, both directions of the layout, graphs."""
    config = spmm24_mma.pick_config(weight.format, 5, weight.N, weight.K, 132)
    for split in (1, 2, 4):
        named = type(config)(**{**vars(config), "SPLIT_K": split})
        run_way(tally, way, weight, prepared, x, f"{label} SPLIT_K={split}", config=named)
    values, meta, *scales = weight.tensors
    back = fragments24.restore(*prepared[:2], weight.format, weight.N, weight.K, values.dtype)
    trouble = (
        None
        if all(map(torch.equal, (back[0].view(torch.uint8), back[1]), (values.view(torch.uint8), meta)))
        else "restore is not exact"
    )
    tally.add(f"fragments {weight.format}", label, trouble)
    if weight.N % 2 == 0:
        fragments = fragments24.prepare(values, meta, weight.format, True)
        gated = (fragments24.prepare_scales(scales[0], True),) if weight.format == "semi24_int4" else tuple(scales)
        for extra in ({}, {"residual": torch.randn(5, weight.N // 2, device=x.device).to(x.dtype)}):
            run_way(
                tally,
                way,
                weight,
                (*fragments, *gated),
                x,
                f"{label} silu_mul {list(extra)}",
                activation="silu_mul",
                **extra,
            )

    if weight.format == "semi24_int8" and x.is_cuda:  # the stand-ins of a dry run know no integer tokens
        tally.attempt("mma int8 tokens", label, lambda: integer_product(weight, prepared, x))

    def replayed() -> tuple[str | None, float]:
        static = torch.randn_like(x)
        outputs: list[Tensor] = []
        run = capture([lambda: outputs.append(mma_kernel(weight.format)(static, *prepared, weight.N))], x.device)
        static.copy_(x)
        run()
        return judge(outputs[-1], outputs[-1].clone(), x, weight.dense, {})

    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":  # without its pool torch cannot capture
        tally.attempt(f"mma {weight.format}", f"{label} in a CUDA graph", replayed)


def check_packers(tally: Tally, N: int, K: int, dtype: torch.dtype, machine: Machine) -> None:
    """decompress24, compress24, search24 and cuSPARSELt's way back: exact, so compared bit by bit."""
    device, label = machine.device, f"N={N} K={K} {dtype}"
    w = random24(N, K, dtype, device)
    w[:, : K // 2] *= torch.where(torch.rand(N, K // 2, device=device) > 0.2, 1.0, -0.0).to(dtype)
    canonical = layout24.compress24(w)

    def same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> tuple[str | None, float]:
        bits = [
            all(map(torch.equal, map(_bytes, pair[:1]), map(_bytes, pair[1:])))
            for pair in zip(found, expected, strict=True)
        ]
        return (None if all(bits) else f"bits differ in tensors {[i for i, ok in enumerate(bits) if not ok]}"), 0.0

    tally.attempt(
        "decompress24",
        label,
        lambda: same((spmm24.decompress24(*canonical, K),), (layout24.decompress24(*canonical, K),)),
    )
    tally.attempt("compress24", label, lambda: same(compress24.compress24(w), canonical))
    tally.attempt(
        "compress24", f"{label} transposed", lambda: same(compress24.compress24(w.t().contiguous().t()), canonical)
    )
    dense = torch.randn(N, K, device=device).to(dtype).round(decimals=1)  # with ties
    for name, scores in (("search24", None), ("search24 scores", torch.rand(N, K, device=device).round(decimals=1))):
        keep = keep_by_sort(dense.abs() if scores is None else scores)
        masked = torch.where(keep, dense, torch.zeros_like(dense))
        expected = (*layout24.compress24(masked), keep, masked)
        tally.attempt(
            name,
            label,
            lambda s=scores, e=expected: same(tuple(compress24.search24(dense, s, keep=True, masked=True)), e),
        )
    if cusparselt.why_not(dtype, N, K, device) is None:
        tally.attempt(
            "cusparselt",
            f"{label} restore",
            lambda: same(cusparselt.restore(*cusparselt.prepare(*canonical, K), N, K), canonical),
        )


def _bytes(x: Tensor) -> Tensor:
    """The bits, with both zeros alike: a dense weight may hold -0.0 where the layout has +0.0."""
    x = x + 0.0 if x.is_floating_point() else x
    return x.contiguous().view(torch.uint8)


def keep_by_sort(scores_NK: Tensor) -> Tensor:
    """The two highest of each four, ties to the lower index, by a stable sort."""
    N, K = scores_NK.shape
    padded = F.pad(scores_NK.double(), (0, -K % 4), value=-torch.inf).view(N, -1, 4)
    rank = padded.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return (rank < 2).view(N, -1)[:, :K]


def check_refusals(tally: Tally, machine: Machine) -> None:
    """No tokens give an empty result; what does not fit is refused by a ValueError that says so."""
    device, dtype = machine.device, torch.bfloat16
    weight = pack(random24(64, 128, dtype, device), "semi24")
    for way in WAYS.values():
        if way.why_not(weight) is not None:
            continue
        prepared = way.prepare(weight)
        empty = torch.empty(0, 128, dtype=dtype, device=device)
        tally.attempt(
            f"{way.name} semi24",
            "M=0",
            lambda w=way, p=prepared, x=empty: (None if w.linear(x, p, weight).shape == (0, 64) else "shape", 0.0),
        )
        if machine.dry_run:
            continue
        for case, x in {
            "K + 8 features": torch.randn(4, 136, device=device).to(dtype),
            "float64": torch.randn(4, 128, device=device).double(),
            "x on the CPU": torch.randn(4, 128).to(dtype),
        }.items():
            try:
                way.linear(x, prepared, weight)
                trouble = "was not refused"
            except (ValueError, RuntimeError) as error:
                trouble = None if isinstance(error, ValueError) or "cannot run" in str(error) else f"refused by {error}"
            tally.add("refusals", f"{way.name}: {case}", trouble)


@dataclass(frozen=True)
class Unit:
    """What one process checks at a time: a shape in a dtype, and a format, "blocks" or "packers"."""

    N: int
    K: int
    dtype: torch.dtype
    work: str

    def __str__(self) -> str:
        return f"{self.work} N={self.N} K={self.K} {str(self.dtype).removeprefix('torch.')}"


def units(small: bool) -> list[Unit]:
    """Everything there is to check; small shapes first, so that a lack of time costs the large ones."""
    found = [Unit(65, 136, torch.float32, "packers")]
    for (N, K), dtype in itertools.product(SMALL[:4] if small else SMALL + LARGE, (torch.bfloat16, torch.float16)):
        works = ("packers", *FORMATS, *(("blocks",) if N * K < 1 << 22 else ()))
        found += [Unit(N, K, dtype, work) for work in works]
    return found


def check(mine: list[Unit], small: bool, machine: Machine) -> Tally:
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    tally = Tally()
    for unit in mine:
        if machine.is_late(str(unit)):
            continue
        if unit.work == "packers":
            check_packers(tally, unit.N, unit.K, unit.dtype, machine)
        else:
            check_format(tally, unit, SMALL_TOKENS if small else TOKENS, machine)
        machine.free_memory()
    return tally


def check_in_processes(options: argparse.Namespace, machine: Machine) -> Tally:
    """Deal the units to processes like this one, and add up what they found."""
    folder = Path(tempfile.mkdtemp())
    command = [sys.executable, __file__, "--seconds", str(machine.seconds_left())]
    command += ["--dry-run"] * options.dry_run + ["--small"] * options.small
    workers = []
    for i in range(options.workers):
        report = folder / f"{i}.json"
        workers.append((report, subprocess.Popen([*command, "--part", str(i), str(options.workers), str(report)])))
    tally = Tally()
    for i, (report, process) in enumerate(workers):
        try:
            process.wait(timeout=max(machine.seconds_left(), 0) + 45)
        except subprocess.TimeoutExpired:
            process.kill()
        if not report.exists():
            tally.add("processes", str(i), "ended without a report: a crash of the GPU, or out of time")
            continue
        found = Tally(**json.loads(report.read_text()))
        for family, tried in found.tried.items():
            tally.tried[family] = tally.tried.get(family, 0) + tried
            tally.worst[family] = max(tally.worst.get(family, 0.0), found.worst[family])
        tally.failures += found.failures
    return tally


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a few small shapes, as for compute-sanitizer")
    parser.add_argument("--workers", type=int, default=max(min((os.cpu_count() or 2) - 2, 14), 1), help="processes")
    parser.add_argument("--part", nargs=3, metavar=("I", "N", "FILE"), help="of a worker: every N-th unit from I")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS warns that it is not deterministic
    os.environ["SPARSEKIT_TUNING"] = "off"  # every kernel is called by its name: nothing need be measured
    machine, options = open_machine(__doc__.splitlines()[0], parser)
    small = options.small or machine.dry_run
    if machine.dry_run:
        import gpu_dry

        gpu_dry.install()
    if options.part:
        first, step, report = options.part
        tally = check(units(small)[int(first) :: int(step)], small, machine)
        Path(report).write_text(json.dumps(vars(tally)))
        return 0
    if options.workers > 1:
        tally = check_in_processes(options, machine)
    else:
        tally = check(units(small), small, machine)
    check_refusals(tally, machine)
    for case in kd_cases()[: 6 if small else None]:
        tally.attempt("kd_loss", str(case), lambda c=case: (kd_wrong(*c, machine.device), 0.0))
    for family, tried in sorted(tally.tried.items()):
        failures = [failure for failure in tally.failures if failure.startswith(f"{family} ")]
        worst = tally.worst[family]
        row = {"family": family, "tried": tried, "failed": len(failures), "worst_error_over_dense": round(worst, 3)}
        machine.record("gpu_check", row | {"small": small, "failures": failures[:5]})
        say(f"{family:28} {tried:5} cases, {len(failures):3} wrong, largest error {worst:.2f} times dense")
    say(f"check: {sum(tally.tried.values())} cases, {len(tally.failures)} wrong")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
