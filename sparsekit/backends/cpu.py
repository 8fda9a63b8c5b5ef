"""`cpu`: our C++ kernels, compiled on first use; AVX-512 BF16 and VNNI down to portable code."""

from collections.abc import Sequence

import torch
from sparsekit_kernels import cpu, spmm_block_cpu
from sparsekit_kernels.layout24 import decompress24
from sparsekit_kernels.layout_block import decompress_block
from sparsekit_kernels.quant import dequantize24
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec


class CpuRunner(Runner):
    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        return cpu.why_not(spec.dtype)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        return f"{spec.format.replace('semi24', 'spmm24')}, {cpu.isa()}"


class Semi24Runner(CpuRunner):
    format = "semi24"

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        return cpu.prepare(packed.tensors["values"], packed.tensors["meta"])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        blocks, masks = prepared
        values, meta = cpu.restore(blocks, masks, spec.out_features)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        blocks, masks = prepared
        return cpu.spmm24(x, blocks, masks, N, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        blocks, masks = prepared
        return decompress24(*cpu.restore(blocks, masks, N), K)


class Int8Runner(CpuRunner):
    format = "semi24_int8"

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        parts = packed.tensors
        return *cpu.prepare_int8(parts["values"], parts["meta"]), parts["scales"]

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        blocks, masks, scales = prepared
        values, meta = cpu.restore_int8(blocks, masks, spec.out_features)
        return PackedWeight(spec, {"values": values, "meta": meta, "scales": scales})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        blocks, masks, scales = prepared
        return cpu.spmm24_int8(x, blocks, masks, scales, N, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        blocks, masks, scales = prepared
        values, meta = cpu.restore_int8(blocks, masks, N)
        return decompress24(dequantize24(values, scales, self.format, K, dtype), meta, K)


class Int4Runner(CpuRunner):
    format = "semi24_int4"

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        parts = packed.tensors
        return cpu.prepare_int4(parts["values"], parts["meta"], parts["scales"])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        blocks, masks, scales = prepared
        values, meta, scales = cpu.restore_int4(blocks, masks, scales, spec.out_features)
        return PackedWeight(spec, {"values": values, "meta": meta, "scales": scales})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        blocks, masks, scales = prepared
        return cpu.spmm24_int4(x, blocks, masks, scales, N, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        blocks, masks, scales = prepared
        values, meta, scales = cpu.restore_int4(blocks, masks, scales, N)
        return decompress24(dequantize24(values, scales, self.format, K, dtype), meta, K)


class BlockRunner(CpuRunner):
    """In plain torch: it needs no compiler."""

    format = "block"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        if spec.dtype not in spmm_block_cpu.DTYPES:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f"the CPU path for blocks multiplies bfloat16 and float32, not {dtype}"
        return None

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        values, columns, row_pointers = packed.tensors.values()
        return spmm_block_cpu.prepare(values, columns, row_pointers)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, dict(zip(FORMATS.get("block").names, _restore_block(prepared), strict=True)))

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        return spmm_block_cpu.spmm_block(x, tuple(prepared), N, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        return decompress_block(*_restore_block(prepared), N, K)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        return "torch's products of the stored blocks"


def _restore_block(prepared: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    values, columns, row_pointers, order, batches = prepared
    return spmm_block_cpu.restore(values, columns, row_pointers, order, batches)


BACKENDS.register("cpu", Backend("cpu", [Semi24Runner(), Int8Runner(), Int4Runner(), BlockRunner()]))
