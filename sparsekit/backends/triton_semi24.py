"""2:4 weights on NVIDIA GPUs: as the fragments that `mma.sp` reads, or straight from the canonical layout."""

from collections.abc import Sequence

import torch
from sparsekit_kernels import cusparselt, fragments24, target
from sparsekit_kernels.layout24 import decompress24
from sparsekit_kernels.quant import GRIDS, dequantize24
from torch import Tensor

from sparsekit.backends.base import Runner, kernels
from sparsekit.errors import Unsupported
from sparsekit.formats import PackedWeight, WeightSpec

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


class FragmentRunner(Runner):
    """One copy of the weight, in fragments, for every number of tokens; the fastest kernel by measurement.

    Prepared are fragments, metadata, the scales of a quantised format, and, where `prefill` asks for it, the weight
    once more in cuSPARSELt's layout.
    """

    def __init__(self, format: str) -> None:
        self.format = format
        self.prefills = ("dense", "cusparselt") if format == "semi24" else ("dense",)
        self._num_scales = int(format in GRIDS)

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if target.INTERPRETED:
            return "Triton's interpreter cannot run mma.sp"
        if spec.dtype not in SIXTEEN_BITS:
            return f"sparse tensor cores multiply bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
        if spec.out_features == 0 or spec.in_features == 0:
            return "an empty weight has no fragments"
        return target.why_not(device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        parts, spec = packed.tensors, packed.spec
        prepared = fragments24.prepare(parts["values"], parts["meta"], self.format)
        if self._num_scales:
            int4 = self.format == "semi24_int4"
            return *prepared, fragments24.prepare_scales(parts["scales"]) if int4 else parts["scales"]
        if prefill == "cusparselt" or (prefill == "auto" and self._pays(spec, parts["values"].device)):
            reason = cusparselt.why_not(spec.dtype, spec.out_features, spec.in_features, parts["values"].device)
            if reason is not None:
                raise Unsupported(f"prefill='cusparselt' cannot run {spec}: {reason}. Use prefill='dense'")
            return *prepared, *cusparselt.prepare(parts["values"], parts["meta"], spec.in_features)
        return prepared

    def second_copy_bytes(self, prepared: Sequence[Tensor]) -> int:
        return sum(tensor.nbytes for tensor in prepared[2 + self._num_scales :])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        N, K = spec.out_features, spec.in_features
        storage = GRIDS[self.format].storage if self._num_scales else spec.dtype
        values, meta = fragments24.restore(prepared[0], prepared[1], self.format, N, K, storage)
        tensors = {"values": values, "meta": meta}
        if self._num_scales:
            scales = prepared[2]
            int4 = self.format == "semi24_int4"
            tensors["scales"] = fragments24.restore_scales(scales, N, K) if int4 else scales
        return PackedWeight(spec, tensors)

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        fragments, metadata, *others = prepared
        third = others[0] if others else None
        scales, blob = (third, None) if self._num_scales else (None, third)
        y: Tensor = kernels("prefill24").spmm24_large(
            x, fragments, metadata, N, bias, format=self.format, scales=scales, blob=blob
        )
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        if dtype in SIXTEEN_BITS and prepared[0].is_cuda:
            scales = prepared[2] if self._num_scales else None
            w: Tensor = kernels("spmm24_mma").decompress(
                prepared[0], prepared[1], N, K, dtype, format=self.format, scales=scales
            )
            return w
        packed = self.restore(WeightSpec(self.format, N, K, dtype), tuple(prepared))
        values = packed.tensors["values"]
        if self._num_scales:
            values = dequantize24(values, packed.tensors["scales"], self.format, K, dtype)
        return decompress24(values, packed.tensors["meta"], K)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        choice = kernels("prefill24").choice_for(
            num_tokens, spec.out_features, spec.in_features, spec.dtype, current_device(), format=self.format
        )
        return {"mma": "mma.sp on fragments", "decompress": "fragments to dense, then torch's dense product"}.get(
            choice.kernel, "cuSPARSELt"
        ) + ("" if choice.source == "asked" else f" ({choice.source})")

    def against_dense(self, spec: WeightSpec, device: torch.device) -> str:
        N, K = spec.out_features, spec.in_features
        return str(kernels("prefill24").stay_dense(N, K, spec.dtype, device, format=self.format))

    def _pays(self, spec: WeightSpec, device: torch.device) -> bool:
        """Whether a copy in cuSPARSELt's layout was measured to be faster somewhere by more than noise."""
        gains = kernels("prefill24").blob_speedups(spec.out_features, spec.in_features, spec.dtype, device)
        return max(gains.values(), default=1.0) > 1.03


class Semi24Runner(Runner):
    """`semi24`: 16-bit weights in fragments; fp32 ones, and all under Triton's interpreter, in the canonical layout."""

    format = "semi24"
    prefills = ("dense", "cusparselt")

    def __init__(self) -> None:
        self._fragments = FragmentRunner("semi24")

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        return target.why_not(device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        device = packed.tensors["values"].device
        if self._fragments.why_not(packed.spec, device) is None:
            return self._fragments.prepare(packed, prefill)
        if prefill == "cusparselt":
            raise Unsupported(f"prefill='cusparselt' needs a 16-bit weight, this is {packed.spec}: use prefill='dense'")
        return packed.tensors["values"].contiguous(), packed.tensors["meta"].contiguous()

    def second_copy_bytes(self, prepared: Sequence[Tensor]) -> int:
        return self._fragments.second_copy_bytes(prepared)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        if prepared[0].dtype == torch.int32:
            return self._fragments.restore(spec, prepared)
        return PackedWeight(spec, {"values": prepared[0], "meta": prepared[1]})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        if prepared[0].dtype == torch.int32:
            return self._fragments.linear(x, prepared, bias, N, K)
        values, meta = prepared
        y: Tensor = kernels("spmm24").spmm24(x, values, meta, bias)
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        if prepared[0].dtype == torch.int32:
            return self._fragments.dense(prepared, N, K, dtype)
        values, meta = prepared
        return decompress24(values, meta, K)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        if target.INTERPRETED or spec.dtype not in SIXTEEN_BITS:
            few = num_tokens <= kernels("spmm24").DENSE_ABOVE
            return "spmm24" if few else "decompress24, then torch's dense product"
        return self._fragments.kernel(spec, num_tokens)

    def against_dense(self, spec: WeightSpec, device: torch.device) -> str:
        return "" if self._fragments.why_not(spec, device) else self._fragments.against_dense(spec, device)


def current_device() -> torch.device:
    """The device whose tables `kernel` reads: specs do not say where their weight is."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
