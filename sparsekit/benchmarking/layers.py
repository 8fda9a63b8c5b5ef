"""One layer shape, dense against sparse, at some numbers of tokens M (rows of x)."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.benchmarking.machine import cache_bytes, free_bytes, measure_ceilings
from sparsekit.benchmarking.timing import Comparison, rotate, time_pair
from sparsekit.errors import SparsekitError, Unsupported
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.nn import SideLinear, SparseLinear, dense_layer, merged_layer
from sparsekit.nn.side_columns import SideColumns
from sparsekit.plan import SideBranch

MAX_COPIES = 16


@dataclass(frozen=True)
class LayerShape:
    """Layers of a model that share one weight shape and packed format.

    Attributes:
        name: how the model calls them, as "q_proj, o_proj".
        out_features: N.
        in_features: K.
        count: how many of them one pass through the model runs.
        format: in which the sparse side is packed.
        block, num_blocks: of format "block": rows and columns of a block, and how many of them are stored.
        side: where the side branch lies in the packed weight; None where there is none.
    """

    name: str
    out_features: int
    in_features: int
    count: int = 1
    format: str = "semi24"
    block: tuple[int, int] | None = None
    num_blocks: int | None = None
    side: SideColumns | None = None

    def __str__(self) -> str:
        return f"{self.out_features}x{self.in_features}"

    def nbytes(self, dtype: torch.dtype) -> int:
        """Return the bytes of one dense weight."""
        return self.out_features * self.in_features * dtype.itemsize

    def spec(self, dtype: torch.dtype) -> WeightSpec:
        """Return the packed weight that is timed."""
        K = self.in_features if self.side is None else self.side.packed_features
        return WeightSpec(self.format, self.out_features, K, dtype, self.block, self.num_blocks)


def in_format(shapes: Sequence[LayerShape], format: str) -> list[LayerShape]:
    """Return the shapes with another format of 2:4 weights; "auto" leaves each its own.

    Raises:
        ValueError: no such format, or it is "block", whose speed a shape alone does not tell.
    """
    FORMATS.check(format)
    if format == "auto":
        return list(shapes)
    if format == "block":
        raise ValueError(
            "format='block': its speed depends on how many blocks are stored, which a shape does not tell. Prune to "
            "blocks and save, then name that checkpoint"
        )
    return [replace(shape, format=format, block=None, num_blocks=None) for shape in shapes]


def random24(N: int, K: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Return a random weight [N, K] with two non-zeros in every group of four along K; a rest group is full."""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]])
    rows = min(N, 256)  # time does not depend on the values, so a few random rows are repeated
    groups = -(-K // 4)
    chosen = pairs[torch.randint(len(pairs), (rows, groups), generator=generator)]
    keep = torch.zeros(rows, groups, 4).scatter_(-1, chosen, 1.0).view(rows, -1)[:, :K]
    values = torch.randn(rows, K, generator=generator) * keep / math.sqrt(max(K, 1) / 2)
    return values.to(dtype).to(device).repeat(-(-N // rows), 1)[:N].contiguous()


def random_block(spec: WeightSpec, device: torch.device | str = "cpu", seed: int = 0) -> Tensor:
    """Return a random weight [N, K] of format "block" that stores as many blocks as `spec` says."""
    if spec.block is None or spec.num_blocks is None:
        raise ValueError(f"{spec} lacks block and num_blocks: give the shape both")
    N, K, (BN, BK) = spec.out_features, spec.in_features, spec.block
    generator = torch.Generator().manual_seed(seed)
    NB, KB = -(-N // BN), -(-K // BK)
    keep = torch.zeros(NB * KB, dtype=torch.bool)
    keep[torch.randperm(NB * KB, generator=generator)[: spec.num_blocks]] = True
    keep_NK = keep.view(NB, KB).repeat_interleave(BN, 0)[:N].repeat_interleave(BK, 1)[:, :K]
    rows = torch.randn(min(N, 256), K, generator=generator) / math.sqrt(max(K, 1) / 2)
    w_NK = rows.to(spec.dtype).repeat(-(-N // len(rows)), 1)[:N]
    return w_NK.mul_(keep_NK).add_(0.0).to(device)  # + 0.0: no -0.0, which packs as a value


def build_pair(
    shape: LayerShape,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    backend: str = "auto",
) -> tuple[list[nn.Module], list[SparseLinear]]:
    """Return dense and packed copies of one random layer, enough of them that none is still in the cache.

    Where the format rounds, the dense copies hold the rounded weights, and a side branch is folded into them: both
    sides then have the same answer.

    Raises:
        Unsupported: the memory does not hold one copy of each.
    """
    if shape.format == "block":
        w_NK = random_block(shape.spec(dtype), device)
    else:
        w_NK = random24(shape.out_features, shape.in_features, dtype, device)
    room = free_bytes(device) // 2
    if room < 2 * w_NK.nbytes:
        raise Unsupported(f"{shape} in {dtype} needs {4 * w_NK.nbytes / 1e9:.1f} GB free to be timed")
    needed = 1 if torch.device(device).type == "cuda" else math.ceil(3 * cache_bytes(device) / max(w_NK.nbytes // 2, 1))
    copies = max(1, min(needed, MAX_COPIES, room // max(2 * w_NK.nbytes, 1)))
    branch = None if shape.side is None else _random_branch(shape.side, w_NK)
    sparse = [SparseLinear.from_dense(w_NK, format=shape.format, backend=backend, branch=branch) for _ in range(copies)]
    return [plain_twin(layer) for layer in sparse], sparse


def _random_branch(side: SideColumns, w_NK: Tensor, seed: int = 0) -> SideBranch:
    """Return a random branch for this weight, its share of the output a small one."""
    generator = torch.Generator().manual_seed(seed)
    S = torch.randn(w_NK.shape[0], side.rank, generator=generator) / (10 * math.sqrt(side.in_features))
    X = torch.randn(side.rank, side.in_features, generator=generator) / math.sqrt(side.rank) if side.has_X else None
    return SideBranch(S.to(w_NK), None if X is None else X.to(w_NK), side.group)


def plain_twin(layer: SparseLinear) -> nn.Module:
    """Return the plain dense layer with the same answer, a side branch folded into its weight."""
    dense = dense_layer(layer)
    return merged_layer(dense) if isinstance(dense, SideLinear) else dense


def time_layers(
    dense: Sequence[nn.Module],
    sparse: Sequence[SparseLinear],
    num_tokens: int,
    *,
    rounds: int = 30,
    max_seconds: float = 1.0,
) -> Comparison:
    """Return the timings of y = x W^T with x [num_tokens, K], rotating over equal layers; answers are compared first.

    Raises:
        SparsekitError: dense and sparse do not agree.
    """
    spec, K = sparse[0].spec, sparse[0].in_features
    device = next(dense[0].parameters()).device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_tokens, K, generator=generator).to(spec.dtype).to(device)
    with torch.inference_mode():
        agree(f"{spec} at M={num_tokens}", dense[0](x), sparse[0](x), LAYER_TOLERANCE)
        return time_pair(
            rotate([lambda layer=layer: layer(x) for layer in dense]),  # type: ignore[misc]
            rotate([lambda layer=layer: layer(x) for layer in sparse]),  # type: ignore[misc]
            rounds=rounds,
            warmup=max(2, len(dense)) if num_tokens <= 64 else 2,
            max_seconds=max_seconds,
            device=device,
        )


LAYER_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
MODEL_TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 0.15}
"""Relative L2 error; a misplaced column or group gives an error near 1."""


def agree(what: str, dense: Tensor, sparse: Tensor, tolerance: dict[torch.dtype, float]) -> float:
    """Return the relative L2 distance of two outputs.

    Raises:
        SparsekitError: it is above `tolerance` for their dtype, or not finite.
    """
    limit = tolerance.get(dense.dtype, 1e-3)
    distance = torch.linalg.vector_norm(sparse.float() - dense.float())
    error = float(distance / torch.linalg.vector_norm(dense.float()).clamp_min(1e-30)) if dense.numel() else 0.0
    if not error <= limit:
        raise SparsekitError(
            f"{what}: the sparse output is {error:.2g} away from the dense one, {limit:.2g} is allowed"
        )
    return error


def layer_row(
    shape: LayerShape, sparse: SparseLinear, num_tokens: int, timings: Comparison, with_ceiling: bool = True
) -> dict[str, Any]:
    """Return one line of a report: medians, speed-up, and how near the sparse kernel is to this machine's ceiling."""
    seconds = timings["sparse"].median
    flops = 2 * num_tokens * shape.out_features * shape.in_features
    row: dict[str, Any] = {
        "layer": shape.name,
        "shape": str(shape),
        "count": shape.count,
        "M": num_tokens,
        "dense ms": timings["dense"].median * 1e3,
        "sparse ms": seconds * 1e3,
        "speedup": round(timings.ratio("dense", "sparse"), 3),
        "format": sparse.format,
        "backend": sparse.backend,
    }
    if with_ceiling:
        device = sparse.prepared[0].device
        ceilings = measure_ceilings(device, (sparse.spec.dtype,))
        row["GB/s"] = sparse.packed_bytes() / 1e9 / seconds
        row["noise"] = round(timings.noise, 2)
        row["of ceiling"] = round(ceilings.share(sparse.packed_bytes(), flops, seconds, sparse.spec.dtype), 2)
    return row


def measure_shapes(
    shapes: Sequence[LayerShape],
    num_tokens: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    backend: str = "auto",
    max_seconds: float = 1.0,
) -> Iterator[dict[str, Any]]:
    """Yield a `layer_row` for each shape and number of tokens, on random weights."""
    for shape in shapes:
        dense, sparse = build_pair(shape, dtype, device, backend=backend)
        for m in num_tokens:
            yield layer_row(shape, sparse[0], m, time_layers(dense, sparse, m, max_seconds=max_seconds))
