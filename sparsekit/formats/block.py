"""`block`: weights whose zeros come in whole blocks, see `sparsekit_kernels.layout_block`."""

from typing import Any

import torch
from sparsekit_kernels.layout_block import (
    best_block,
    block_bytes,
    block_grid,
    check_block,
    compress_block,
    decompress_block,
)
from torch import Tensor

from sparsekit.errors import CheckpointError, Unsupported
from sparsekit.formats.base import FORMATS, Format, PackedWeight, WeightSpec, with_dtype

MOST_OF_DENSE = 0.8
"""A weight that takes a larger share of its dense bytes than this stays dense unless `block` is asked for by name."""


def share_of_dense(w_NK: Tensor) -> float:
    """Return which share of its dense bytes a weight takes in this format."""
    (N, K), (block, stored) = w_NK.shape, best_block(w_NK)
    return block_bytes(N, K, block, stored, w_NK.element_size()) / max(w_NK.nbytes, 1)


class Block(Format):
    """Whole blocks are stored or zero; the size of the blocks is found in the weight, see `best_block`."""

    name = "block"
    names = ("values", "columns", "row_pointers")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        if spec.block is None or spec.num_blocks is None:
            raise ValueError(f"{spec} lacks block and num_blocks, without which its tensors have no shape")
        num_rows = block_grid(spec.out_features, spec.in_features, spec.block)[0]
        return {
            "values": ((spec.num_blocks, *spec.block), spec.dtype),
            "columns": ((spec.num_blocks,), torch.int32),
            "row_pointers": ((num_rows + 1,), torch.int32),
        }

    def spec(self, N: int, K: int, dtype: torch.dtype, details: dict[str, Any]) -> WeightSpec:
        block, num_blocks = details.get("block"), details.get("num_blocks")
        sides = block if isinstance(block, list) and len(block) == 2 else [0, 0]
        legal = all(isinstance(side, int) and side > 0 for side in sides)
        if legal and isinstance(num_blocks, int):
            NB, KB = block_grid(N, K, (sides[0], sides[1]))
            if 0 <= num_blocks <= NB * KB:
                return WeightSpec(self.name, N, K, dtype, (sides[0], sides[1]), num_blocks)
        raise CheckpointError(
            f"block={block!r} and num_blocks={num_blocks!r} describe no {N}x{K} weight: fetch the checkpoint again"
        )

    def details(self, spec: WeightSpec) -> dict[str, Any]:
        return {"block": list(spec.block or ()), "num_blocks": spec.num_blocks}

    def count_violations(self, w_NK: Tensor) -> tuple[int, int]:
        """Return (stored blocks, or 0 where they make the weight smaller by enough, blocks in all)."""
        (N, K), itemsize = w_NK.shape, w_NK.element_size()
        block, stored = best_block(w_NK)
        NB, KB = block_grid(N, K, block)
        small = block_bytes(N, K, block, stored, itemsize) <= MOST_OF_DENSE * N * K * itemsize
        return 0 if small else stored, NB * KB

    def describe_violations(self, broken: int, units: int) -> str:
        return f"{broken:,} of {units:,} blocks hold non-zeros, too many for {self.name}"

    def pack(self, w_NK: Tensor, scales: Tensor | None = None) -> PackedWeight:
        if scales is not None:
            raise ValueError(f"{self.name} holds weights as they are: it takes no scales")
        if w_NK.dtype not in self.dtypes:
            raise Unsupported(
                f"{self.name} holds bfloat16, float16 and float32, not {w_NK.dtype}: convert the weight first"
            )
        block, num_blocks = best_block(w_NK)
        values, columns, row_pointers = compress_block(w_NK, block)
        spec = WeightSpec(self.name, w_NK.shape[0], w_NK.shape[1], w_NK.dtype, block, num_blocks)
        return PackedWeight(spec, {"values": values, "columns": columns, "row_pointers": row_pointers})

    def unpack(self, packed: PackedWeight) -> Tensor:
        values, columns, row_pointers = packed.tensors.values()
        return decompress_block(values, columns, row_pointers, packed.spec.out_features, packed.spec.in_features)

    def cast(self, packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        values = packed.tensors["values"]
        if values.is_meta:
            return PackedWeight(with_dtype(packed.spec, dtype), {**packed.tensors, "values": values.to(dtype)})
        return self.pack(self.unpack(packed).to(dtype))  # a narrower dtype may turn small values into zeros

    def validate(self, packed: PackedWeight) -> None:
        self.check_parts(packed)
        if not bool(torch.isfinite(packed.tensors["values"]).all()):
            raise CheckpointError("values hold NaN or infinity: the checkpoint is damaged, fetch it again")
        try:
            values, columns, row_pointers = packed.tensors.values()
            check_block(values, columns, row_pointers, packed.spec.out_features, packed.spec.in_features)
        except ValueError as error:
            raise CheckpointError(f"{error}: the checkpoint is damaged, fetch it again") from None


FORMATS.register("block", Block())
