"""What every format offers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.registry import Registry

LAYOUT_VERSION = 1
"""Of the canonical layouts; written into every packed checkpoint, and a later one is refused."""


@dataclass(frozen=True)
class WeightSpec:
    """All about a packed weight that is not in its tensors.

    Attributes:
        format: name in `FORMATS`.
        out_features: N.
        in_features: K, without padding.
        dtype: of the dense weight.
    """

    format: str
    out_features: int
    in_features: int
    dtype: torch.dtype

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
    """One canonical layout. `unpack(pack(w))` equals `w`, and equal weights pack to equal bytes."""

    name: str
    dtypes: tuple[torch.dtype, ...]

    @abstractmethod
    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of the tensors that hold a weight of this spec."""

    @abstractmethod
    def count_violations(self, w_NK: Tensor) -> tuple[int, int]:
        """Return (units of `w_NK` that this format cannot hold, units in all)."""

    @abstractmethod
    def pack(self, w_NK: Tensor) -> PackedWeight:
        """Return the weight in this layout.

        Raises:
            PatternError: some units cannot be held; the message has their number.
            Unsupported: the dtype is not one of `dtypes`.
        """

    @abstractmethod
    def unpack(self, packed: PackedWeight) -> Tensor:
        """Return the dense weight [N, K], the exact inverse of `pack`."""

    @abstractmethod
    def validate(self, packed: PackedWeight) -> None:
        """Raise CheckpointError if shapes, dtypes or contents cannot have come from `pack`."""


FORMATS: Registry[Format] = Registry("format")
