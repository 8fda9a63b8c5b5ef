"""y = x @ W.T + bias for many tokens, with W in the fragments that decode uses: whichever kernel was measured fastest.

    mma          `spmm24_mma` on the fragments: reads 9/16 of the weight, once for every 64 tokens or so
    decompress   the fragments to a dense weight in scratch, then torch's own product; the scratch is freed on return
    cusparselt   the 2:4 tensor cores at full rate, from a second copy of the weight (`cusparselt.blob_bytes`) that only
                 exists if the user asked for it

`tuning` decides by (N, K, bucket of M, dtype) and GPU. Shapes that no table and no cache knows are measured once, on
first use, outside of graph captures and compilers; meanwhile, and where measuring is switched off, the rule is: mma up
to 512 tokens, then decompress. No rule takes cuSPARSELt unmeasured.

Why 512, in arithmetic (no GPU has confirmed it): on an H200 a dense product of M tokens takes 2 M N K / 790 TFLOP/s and
the scratch another (9/8 + 2) N K bytes / 4.3 TB/s, so decompress takes 2.1 times the dense time at M = 256, 1.6 at 512,
1.3 at 1024 and 1.07 at 4096. mma without any gain from sparsity, at 60 % of the dense rate, takes 1.7 times; with all
of the gain it would be ahead of dense at every M.

The weights of fp8, int8 and int4 go the same ways, but for cuSPARSELt: decompressed to the dtype of x.

Measured is the plain product, without bias, activation and residual: one row serves a weight whatever is applied after
it. The launch of mma is that of the tables, where they have one.

Sparse can lose to a resident dense weight between about 100 and 500 tokens whatever runs. Nobody keeps that weight, so
it is no candidate, but it is measured beside the others: `stay_dense` tells.
"""

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit_kernels import cusparselt, tuning
from sparsekit_kernels.tuning import Candidate, Choice, Standing

MODES = ("auto", "dense", "cusparselt")
MMA_UP_TO = 512  # tokens, where nothing was measured
FEW = 64  # tokens that reading the weight takes longer than multiplying by it

_runners: dict[tuple[object, ...], "Runner"] = {}


def spmm24_large(
    x: Tensor,
    fragments: Tensor,
    metadata: Tensor,
    N: int,
    bias: Tensor | None = None,
    *,
    format: str = "semi24",
    scales: Tensor | None = None,
    blob: Tensor | None = None,
    mode: str = "auto",
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Return x @ W.T + bias, activated, plus residual, for a 2:4 weight; x is [..., K], the result [..., N].

    Right for any number of tokens, meant for more than 64. The first call with a new bucket of M measures, some tenths
    of a second, unless a table or the cache knows.

    Args:
        x, fragments, metadata, N, bias, activation, residual: as `spmm24_mma.spmm24` takes them.
        format: of the weight, see `fragments24`.
        scales: None for semi24, else as the kernel of the format takes them.
        blob: the same semi24 weight from `cusparselt.prepare`, if there is one.
        mode: "auto" for the fastest of all that can run, "dense" for the fastest that needs no blob, "cusparselt" for
            that one whatever it takes.
    Raises:
        ValueError: arguments do not fit together.
        RuntimeError: the device of `x` cannot run this; the message says why.
    """
    K = x.shape[-1]
    M = x.numel() // K if K else 0
    product = x, fragments, metadata, N, bias, format, scales, blob, activation, residual
    if M == 0:  # nothing to choose: the checks and the empty result are its own
        return _mma(format, {})(product)
    # The number of the device and not the device: hashing that costs more than all the rest.
    device = x.get_device()
    shape = (N, K, tuning.bucket(M), format, x.dtype, device, blob is None, mode)
    run = _runners.get(shape)
    if run is None:
        choice = _choose(product, M, mode)
        run = KERNELS[choice.kernel](format, choice.config)
        if choice.lasts:
            _runners[shape] = run
    return run(product)


def choice_for(
    M: int,
    N: int,
    K: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    format: str = "semi24",
    has_blob: bool = False,
    mode: str = "auto",
) -> Choice:
    """Return what `spmm24_large` would run for M >= 1 tokens, as far as that is known without measuring."""
    allowed = _allowed(mode, has_blob)
    if len(allowed) == 1:
        return Choice(allowed[0], {}, "asked")
    return tuning.known(tuning.key(format, dtype, N, K, M), device, allowed, _rule(M))


class DenseVerdict(NamedTuple):
    """Where a resident dense weight would be faster than everything sparse, by measurement."""

    gpu: str
    standings: list[Standing]  # of every bucket that was measured

    @property
    def faster_dense(self) -> list[Standing]:
        """The buckets where dense wins."""
        return [standing for standing in self.standings if standing.speedup < 1]

    @property
    def stays(self) -> bool:
        """Whether dense wins wherever it was measured, and few tokens, where sparse has most to gain, are among it."""
        return len(self.faster_dense) == len(self.standings) and any(one.M <= FEW for one in self.standings)

    def __str__(self) -> str:
        if not self.standings:
            return f"not measured on {self.gpu}"
        lost = ", ".join(f"M={one.M} ({1 / one.speedup:.2f}x)" for one in self.faster_dense)
        gains = [one.speedup for one in self.standings if one.speedup >= 1]
        won = f"sparse is {min(gains):.2f} to {max(gains):.2f}x as fast as dense" if gains else ""
        if not lost:
            return f"{won} at every M that was measured"
        return f"dense is faster at {lost}" + (f"; elsewhere {won}" if won else ", all that was measured")


def stay_dense(
    N: int, K: int, dtype: torch.dtype, device: torch.device, *, format: str = "semi24", has_blob: bool = False
) -> DenseVerdict:
    """Return where dense would be faster than every kernel that may run, and by how much; from tables alone."""
    allowed = {"mma", "decompress"} | ({"cusparselt"} if has_blob else set())
    return DenseVerdict(tuning.gpu_name(device), tuning.against_dense(format, dtype, N, K, device, allowed))


def blob_speedups(N: int, K: int, dtype: torch.dtype, device: torch.device) -> dict[int, float]:
    """Return, for every bucket where all was measured, how much faster the fastest kernel is with a blob than without.

    1 means that the second copy of the weight buys nothing there; an empty result, that nobody has measured.
    """
    with_blob = tuning.against_dense("semi24", dtype, N, K, device, {"mma", "decompress", "cusparselt"})
    without = {one.M: one.us for one in tuning.against_dense("semi24", dtype, N, K, device, {"mma", "decompress"})}
    asked = {one.M: one.us for one in tuning.against_dense("semi24", dtype, N, K, device, {"cusparselt"})}
    return {one.M: without[one.M] / one.us for one in with_blob if one.M in without and one.M in asked}


def _check_launch(key: tuning.Key, config: Mapping[str, int | str]) -> None:
    """Raise TypeError or ValueError if mma cannot be launched like this."""
    try:
        module = _mma_module()
    except ImportError:  # where Triton is missing nothing is launched, and times are all that is read
        return
    module.Config(**config).check(key.format)


tuning.CHECKS["mma"] = _check_launch


def _allowed(mode: str, has_blob: bool) -> tuple[str, ...]:
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known: use one of {', '.join(map(repr, MODES))}")
    if mode == "cusparselt":
        if not has_blob:
            raise ValueError("mode='cusparselt' needs the weight a second time: pass blob, from cusparselt.prepare()")
        return ("cusparselt",)
    return ("mma", "decompress", "cusparselt") if mode == "auto" and has_blob else ("mma", "decompress")


def _rule(M: int) -> str:
    return "mma" if M <= MMA_UP_TO else "decompress"


# x, fragments, metadata, N, bias, format, scales, blob, activation and residual, as every kernel gets them: a plain
# tuple, since making an object of them takes longer than the choice of the kernel.
_Product = tuple[
    Tensor, Tensor, Tensor, int, Tensor | None, str, Tensor | None, Tensor | None, str | None, Tensor | None
]
Runner = Callable[[_Product], Tensor]


def _choose(product: _Product, M: int, mode: str) -> Choice:
    x, _, _, N, _, format, _, blob, _, _ = product
    if x.dtype == torch.int8:
        raise ValueError("x is int8: nothing here rounds activations, call spmm24_mma.spmm24_int8 with their x_scales")
    allowed = _allowed(mode, blob is not None)
    if len(allowed) == 1:
        return Choice(allowed[0], {}, "asked")
    key = tuning.key(format, x.dtype, N, x.shape[-1], M)
    with torch.no_grad():
        return tuning.choose(key, x.device, allowed, _rule(M), lambda: _candidates(product, allowed))


def _candidates(product: _Product, allowed: tuple[str, ...]) -> list[Candidate]:
    """The allowed kernels on this very product, but plain, and for the record the dense weight that nobody keeps."""
    x, fragments, metadata, N, _, format, scales, blob, _, _ = product
    plain = x, fragments, metadata, N, None, format, scales, blob, None, None
    key = tuning.key(format, x.dtype, N, x.shape[-1], x.numel() // x.shape[-1])
    found = []
    for name in allowed:
        config = tuning.best_config(name, key, x.device) or {}
        found.append(Candidate(name, [functools.partial(KERNELS[name](format, config), plain)], config))
    return [*found, Candidate("dense", [functools.partial(_multiply_dense, plain, _dense_weight(plain))])]


def _mma(format: str, config: Mapping[str, int | str]) -> Runner:
    module = _mma_module()
    multiply = getattr(module, "spmm24" + format.removeprefix("semi24"))
    launch = module.Config(**config) if config else None

    def run(product: _Product) -> Tensor:
        x, fragments, metadata, N, bias, _, scales, _, activation, residual = product
        weight = (fragments, metadata) if scales is None else (fragments, metadata, scales)
        y: Tensor = multiply(x, *weight, N, bias, activation=activation, residual=residual, config=launch)
        return y

    return run


def _decompress(format: str, config: Mapping[str, int | str]) -> Runner:
    return lambda product: _multiply_dense(product, _dense_weight(product))


def _cusparselt(format: str, config: Mapping[str, int | str]) -> Runner:
    def run(product: _Product) -> Tensor:
        x, _, _, N, bias, _, _, blob, activation, residual = product
        assert blob is not None
        return _finish(cusparselt.spmm24(x, blob, N, x.shape[-1], bias), activation, residual)

    return run


# What a kernel does with a product, for a format and the config of a choice: found once, and not with every call.
KERNELS: dict[str, Callable[[str, Mapping[str, int | str]], Runner]] = {
    "mma": _mma,
    "decompress": _decompress,
    "cusparselt": _cusparselt,
}


def _dense_weight(product: _Product) -> Tensor:
    """The dense weight [N, K], its rows in the order of W."""
    x, fragments, metadata, N, _, format, scales, _, activation, _ = product
    gated = activation is not None
    return _mma_module().decompress(
        fragments, metadata, N, x.shape[-1], x.dtype, format=format, scales=scales, gated=gated
    )


def _multiply_dense(product: _Product, weight: Tensor) -> Tensor:
    x, _, _, _, bias, _, _, _, activation, residual = product
    return _finish(F.linear(x, weight, bias), activation, residual)


def _finish(y: Tensor, activation: str | None, residual: Tensor | None) -> Tensor:
    """What `spmm24_mma` does in its registers after the product; here y is rounded to its dtype in between."""
    if activation is not None:
        gate, up = y.chunk(2, dim=-1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual


@functools.cache
def _mma_module() -> ModuleType:
    """Imported when it first runs: a machine without Triton can still ask `stay_dense`."""
    from sparsekit_kernels import spmm24_mma

    return spmm24_mma
