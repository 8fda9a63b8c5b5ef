"""`triton`: our kernels on NVIDIA GPUs."""

from collections.abc import Sequence

import torch
from sparsekit_kernels import target
from sparsekit_kernels.layout_block import decompress_block
from sparsekit_kernels.quant import GRIDS
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner, kernels
from sparsekit.backends.triton_semi24 import QuantisedRunner, Semi24Runner
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec

BLOCK_SIDE = 16
"""Sides of blocks are multiples of it, see `sparsekit_kernels.spmm_block`."""


class BlockRunner(Runner):
    format = "block"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.block is not None and any(side % BLOCK_SIDE for side in spec.block):
            rows, columns = spec.block
            return f"its blocks have sides that are multiples of {BLOCK_SIDE}, these are {rows}x{columns}"
        return target.why_not(device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        values = packed.tensors["values"]
        prepared: tuple[Tensor, ...] = kernels("spmm_block").prepare(
            *packed.tensors.values(), num_sms=target.num_sms(values.device)
        )
        return prepared

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, dict(zip(FORMATS.get("block").names, prepared[:3], strict=True)))

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        y: Tensor = kernels("spmm_block").spmm_block(x, prepared, N, bias)
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        values, columns, row_pointers = prepared[:3]
        return decompress_block(values, columns, row_pointers, N, K)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        config = kernels("spmm_block").pick_config(num_tokens, spec.dtype, BLOCK_SIDE)
        return f"spmm_block, {config.kernel}"


BACKENDS.register(
    "triton", Backend("triton", [Semi24Runner(), *(QuantisedRunner(name) for name in GRIDS), BlockRunner()])
)
