"""2:4 weights on NVIDIA GPUs: as the fragments that `mma.sp` reads, or straight from the canonical layout."""

from collections.abc import Sequence
from typing import Any

import torch
from sparsekit_kernels import cusparselt, fragments24, target
from sparsekit_kernels.layout24 import decompress24
from sparsekit_kernels.quant import GRIDS, dequantize24
from torch import Tensor

from sparsekit.backends.base import Runner, kernels
from sparsekit.errors import Unsupported
from sparsekit.formats import PackedWeight, WeightSpec

SIXTEEN_BITS = (torch.bfloat16, torch.float16)
_IN_WORDS = {
    "mma": "mma.sp on fragments",
    "decompress": "fragments to dense, then torch's dense product",
    "cusparselt": "cuSPARSELt",
}


class FragmentRunner(Runner):
    """One copy of the weight, in fragments, for every number of tokens; the fastest kernel by measurement.

    The first two of the prepared tensors are fragments and metadata; what follows is the affair of the two classes.
    """

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if target.INTERPRETED:
            return "Triton's interpreter cannot run mma.sp"
        if spec.dtype not in SIXTEEN_BITS:
            return f"sparse tensor cores multiply bfloat16 and float16, not {str(spec.dtype).removeprefix('torch.')}"
        if spec.out_features == 0 or spec.in_features == 0:
            return "an empty weight has no fragments"
        return target.why_not(device)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        N, K, has_blob = spec.out_features, spec.in_features, self.second_copy_bytes(prepared) > 0
        choice = kernels("prefill24").choice_for(
            num_tokens, N, K, spec.dtype, device or current_device(), format=self.format, has_blob=has_blob
        )
        return f"{_IN_WORDS[choice.kernel]} ({choice.source})"

    def against_dense(self, spec: WeightSpec, device: torch.device, prepared: Sequence[Tensor] = ()) -> str:
        return str(self._verdict(spec, device, self.second_copy_bytes(prepared) > 0))

    def stays_dense(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str:
        verdict = self._verdict(spec, device, has_blob=prefill == "cusparselt")
        return f"on {verdict.gpu} {verdict}" if verdict.stays else ""

    def _verdict(self, spec: WeightSpec, device: torch.device, has_blob: bool) -> Any:
        N, K = spec.out_features, spec.in_features
        return kernels("prefill24").stay_dense(N, K, spec.dtype, device, format=self.format, has_blob=has_blob)


class HalfRunner(FragmentRunner):
    """16-bit weights: fragments, metadata, and where `prefill` asks for it the weight as cuSPARSELt has it, a blob."""

    format = "semi24"
    prefills = ("dense", "cusparselt")

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        values, meta, spec = packed.tensors["values"], packed.tensors["meta"], packed.spec
        prepared = fragments24.prepare(values, meta, self.format)
        if prefill == "dense" or (prefill == "auto" and not self._pays(spec, values.device)):
            return prepared
        reason = cusparselt.why_not(spec.dtype, spec.out_features, spec.in_features, values.device)
        if reason is not None:
            raise Unsupported(f"prefill='cusparselt' cannot run {spec}: {reason}. Use prefill='dense'")
        return *prepared, *cusparselt.prepare(values, meta, spec.in_features)

    def second_copy_bytes(self, prepared: Sequence[Tensor]) -> int:
        return sum(blob.nbytes for blob in prepared[2:])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        fragments, metadata, *_ = prepared
        N, K = spec.out_features, spec.in_features
        values, meta = fragments24.restore(fragments, metadata, self.format, N, K, spec.dtype)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        fragments, metadata, *copies = prepared
        blob = copies[0] if copies else None
        y: Tensor = kernels("prefill24").spmm24_large(x, fragments, metadata, N, bias, blob=blob)
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        fragments, metadata, *_ = prepared
        if fragments.is_cuda:
            w: Tensor = kernels("spmm24_mma").decompress(fragments, metadata, N, K, dtype)
            return w
        return decompress24(*fragments24.restore(fragments, metadata, self.format, N, K, dtype), K)

    def stays_dense(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str:
        has_blob = prefill == "cusparselt" or (prefill == "auto" and self._pays(spec, device))
        return super().stays_dense(spec, device, "cusparselt" if has_blob else "dense")

    def unmeasured(self, spec: WeightSpec, device: torch.device) -> str:
        if cusparselt.why_not(spec.dtype, spec.out_features, spec.in_features, device) or self._gains(spec, device):
            return ""
        return (
            "cuSPARSELt was not measured for it on this GPU. `bash bench/gpu.sh tune` measures, and "
            "prefill='cusparselt' takes the copy unmeasured"
        )

    def _gains(self, spec: WeightSpec, device: torch.device) -> dict[int, float]:
        gains: dict[int, float] = kernels("prefill24").blob_speedups(
            spec.out_features, spec.in_features, spec.dtype, device
        )
        return gains

    def _pays(self, spec: WeightSpec, device: torch.device) -> bool:
        """Whether a copy in cuSPARSELt's layout was measured to be faster somewhere by more than noise."""
        return max(self._gains(spec, device).values(), default=1.0) > 1.03


class QuantisedRunner(FragmentRunner):
    """fp8, int8 and int4: fragments, metadata, scales."""

    def __init__(self, format: str) -> None:
        self.format = format

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        parts = packed.tensors
        scales = fragments24.prepare_scales(parts["scales"]) if self._has_groups else parts["scales"]
        return *fragments24.prepare(parts["values"], parts["meta"], self.format), scales

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        fragments, metadata, scales = prepared
        N, K = spec.out_features, spec.in_features
        values, meta = fragments24.restore(fragments, metadata, self.format, N, K, GRIDS[self.format].storage)
        scales = fragments24.restore_scales(scales, N, K) if self._has_groups else scales
        return PackedWeight(spec, {"values": values, "meta": meta, "scales": scales})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        fragments, metadata, scales = prepared
        y: Tensor = kernels("prefill24").spmm24_large(
            x, fragments, metadata, N, bias, format=self.format, scales=scales
        )
        return y

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        fragments, metadata, scales = prepared
        if dtype in SIXTEEN_BITS and fragments.is_cuda:
            w: Tensor = kernels("spmm24_mma").decompress(
                fragments, metadata, N, K, dtype, format=self.format, scales=scales
            )
            return w
        parts = self.restore(WeightSpec(self.format, N, K, dtype), (fragments, metadata, scales)).tensors
        return decompress24(dequantize24(parts["values"], parts["scales"], self.format, K, dtype), parts["meta"], K)

    @property
    def _has_groups(self) -> bool:
        """Whether scales are those of groups, which lie as the kernel reads them; those of rows lie as they are."""
        return self.format == "semi24_int4"


class Semi24Runner(Runner):
    """`semi24`: 16-bit weights in fragments; fp32 ones, and all under Triton's interpreter, in the canonical layout."""

    format = "semi24"
    prefills = ("dense", "cusparselt")

    def __init__(self) -> None:
        self._fragments = HalfRunner()

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

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        if target.INTERPRETED or spec.dtype not in SIXTEEN_BITS:
            few = num_tokens <= kernels("spmm24").DENSE_ABOVE
            return "spmm24" if few else "decompress24, then torch's dense product"
        return self._fragments.kernel(spec, num_tokens, device, prepared)

    def against_dense(self, spec: WeightSpec, device: torch.device, prepared: Sequence[Tensor] = ()) -> str:
        if self._fragments.why_not(spec, device):
            return ""
        return self._fragments.against_dense(spec, device, prepared)

    def stays_dense(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str:
        return "" if self._fragments.why_not(spec, device) else self._fragments.stays_dense(spec, device, prefill)

    def unmeasured(self, spec: WeightSpec, device: torch.device) -> str:
        return "" if self._fragments.why_not(spec, device) else self._fragments.unmeasured(spec, device)


def current_device() -> torch.device:
    """The device whose tables `kernel` reads where nobody says which: specs do not."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
