"""What every format offers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.registry import Registry

LAYOUT_VERSION = 3
"""Of the canonical layouts; a later one is refused. Written into every checkpoint is the first that has all that is in
it: 1, 2 where a packed weight has a side branch, or 3 where one has that is not packed, or where layers have sizes that
the model's config cannot say."""


@dataclass(frozen=True)
class WeightSpec:
    """All about a packed weight that is not in its tensors.

    Attributes:
        format: name in `FORMATS`.
        out_features: N.
        in_features: K, without padding.
        dtype: of the dense weight, and of x and y.
        block: rows and columns of a block, of a format that has blocks.
        num_blocks: how many of them are stored.
    """

    format: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    block: tuple[int, int] | None = None
    num_blocks: int | None = None

    @property
    def dense_bytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.format} {self.out_features}x{self.in_features} {dtype}"


@dataclass(frozen=True)
class PackedWeight:
    """One weight in its canonical layout.

    Attributes:
        spec: what it is.
        tensors: the parts, by the names and in the order of `Format.parts`.
    """

    spec: WeightSpec
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Format(ABC):
    """One canonical layout.

    A lossless one gives back what it was given: `unpack(pack(w))` equals `w`, and equal weights pack to equal bytes.
    A quantised one rounds when it packs, and from then on is exact: packing what it unpacks, on the same `scales`,
    gives the same dense weight.
    """

    name: str
    names: tuple[str, ...]
    """Of the tensors, in their order."""
    dtypes: tuple[torch.dtype, ...]
    lossless: bool = True
    holds_side: bool = False
    """Whether a side branch can lie behind the weight, as further columns of it."""

    @abstractmethod
    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of the tensors that hold a weight of this spec."""

    def spec(self, N: int, K: int, dtype: torch.dtype, details: dict[str, Any]) -> WeightSpec:
        """Return the spec of a stored weight.

        Args:
            N, K: its shape.
            dtype: of its dense values.
            details: what `details` returned, from a file.
        Raises:
            CheckpointError: the details are none of this format's.
        """
        return WeightSpec(self.name, N, K, dtype)

    def details(self, spec: WeightSpec) -> dict[str, Any]:
        """Return what a loader must know of a weight besides its shape and dtype, to build it empty; fit for JSON."""
        return {}

    @abstractmethod
    def count_violations(self, w_NK: Tensor) -> tuple[int, int]:
        """Return (units of `w_NK` that this format cannot hold, units in all)."""

    def describe_violations(self, broken: int, units: int) -> str:
        """Return what `count_violations` found, as a reason to leave the weight dense."""
        return f"{broken:,} of {units:,} groups break {self.name}"

    @abstractmethod
    def pack(self, w_NK: Tensor, scales: Tensor | None = None) -> PackedWeight:
        """Return the weight in this layout.

        Args:
            w_NK: the dense weight.
            scales: the grid a quantised format shall round to; None lets it choose.
        Raises:
            PatternError: some units cannot be held; the message has their number.
            Unsupported: the dtype is not one of `dtypes`.
            ValueError: `scales` do not fit the weight, or the format has none.
        """

    @abstractmethod
    def unpack(self, packed: PackedWeight) -> Tensor:
        """Return the dense weight [N, K], the exact inverse of `pack`."""

    @abstractmethod
    def cast(self, packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        """Return the weight with another dtype of its dense values; on the meta device too."""

    @abstractmethod
    def validate(self, packed: PackedWeight) -> None:
        """Raise CheckpointError if shapes, dtypes or contents cannot have come from `pack`."""

    def check_parts(self, packed: PackedWeight) -> None:
        """Raise CheckpointError if the shape or dtype of a part is not that of `parts`."""
        for name, (shape, dtype) in self.parts(packed.spec).items():
            tensor = packed.tensors[name]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise CheckpointError(
                    f"{name} is {tensor.dtype} {tuple(tensor.shape)}, {packed.spec} needs {dtype} {shape}: "
                    "the checkpoint does not belong to this model"
                )

    def empty(self, spec: WeightSpec, device: torch.device | str | None = None) -> PackedWeight:
        """Return unwritten tensors for a weight of this spec."""
        parts = self.parts(spec).items()
        return PackedWeight(
            spec, {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in parts}
        )


def with_dtype(spec: WeightSpec, dtype: torch.dtype) -> WeightSpec:
    return replace(spec, dtype=dtype)


FORMATS: Registry[Format] = Registry(
    "format", meant={"int8": "semi24_int8", "int4": "semi24_int4", "fp8": "semi24_fp8", "2:4": "semi24"}
)
