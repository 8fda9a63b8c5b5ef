"""`semi24`: 2:4 weights as values and one nibble per group of four; see `sparsekit_kernels.layout24`."""

import torch
from sparsekit_kernels import cpu
from sparsekit_kernels.layout24 import (
    compress24,
    count_illegal_nibbles,
    count_violations,
    decompress24,
    padded_features,
)
from torch import Tensor

from sparsekit.errors import CheckpointError, PatternError, Unsupported
from sparsekit.formats.base import FORMATS, Format, PackedWeight, WeightSpec


class Semi24(Format):
    """At most two non-zeros in every four consecutive inputs; 9/16 of dense at 16 bits, 17/32 at 32."""

    name = "semi24"
    dtypes = (torch.bfloat16, torch.float16, torch.float32)

    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        N, Kp = spec.out_features, padded_features(spec.in_features)
        return {"values": ((N, Kp // 2), spec.dtype), "meta": ((N, Kp // 8), torch.uint8)}

    def count_violations(self, w_NK: Tensor) -> tuple[int, int]:
        return count_violations(w_NK), w_NK.shape[0] * -(-w_NK.shape[1] // 4)

    def pack(self, w_NK: Tensor) -> PackedWeight:
        if w_NK.dtype not in self.dtypes:
            raise Unsupported(f"semi24 holds bfloat16, float16 and float32, not {w_NK.dtype}: convert the weight first")
        compiled = w_NK.device.type == "cpu" and cpu.why_not() is None
        try:
            values, meta = (cpu.compress24 if compiled else compress24)(w_NK)
        except ValueError:
            broken, groups = self.count_violations(w_NK)
            raise PatternError(
                f"{broken:,} of {groups:,} groups of four have more than two non-zeros: prune to 2:4 before packing"
            ) from None
        spec = WeightSpec(self.name, w_NK.shape[0], w_NK.shape[1], w_NK.dtype)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def unpack(self, packed: PackedWeight) -> Tensor:
        return decompress24(packed.tensors["values"], packed.tensors["meta"], packed.spec.in_features)

    def validate(self, packed: PackedWeight) -> None:
        for name, (shape, dtype) in self.parts(packed.spec).items():
            tensor = packed.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, {packed.spec} needs {dtype} {shape}: "
                    "the checkpoint does not belong to this model"
                )
        if not bool(torch.isfinite(packed.tensors["values"]).all()):
            raise CheckpointError("values hold NaN or infinity: the checkpoint is damaged, fetch it again")
        illegal = count_illegal_nibbles(packed.tensors["meta"])
        if illegal:
            raise CheckpointError(
                f"meta holds {illegal:,} index pairs that no 2:4 weight has: the checkpoint is damaged, fetch it again"
            )


FORMATS.register("semi24", Semi24())
