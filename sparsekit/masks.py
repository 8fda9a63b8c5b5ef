"""A pattern and which entries it keeps."""

import torch
from torch import Tensor

from sparsekit.errors import PatternError
from sparsekit.patterns import Pattern, parse_pattern

# Eight bytes 0/1 read as one int64 and multiplied by this have their bits, lowest first, in the top byte.
_GATHER_BITS = 0x0102040810204080


class Mask:
    """The kept entries of one weight [N, K]; checked against its pattern when built.

    Held as one bit an entry, so that the masks of a 7B model take 0.8 GB and not 6.5.

    Attributes:
        pattern: the `Pattern` obeyed.
        shape: (N, K).
        bits: uint8 [N, ceil(K/8)], the lowest bit is the lowest k.
    """

    def __init__(self, pattern: Pattern | str, keep: Tensor) -> None:
        """Build from a boolean `keep` [N, K], True = kept.

        Raises:
            ValueError: `keep` is not a boolean matrix.
            PatternError: `keep` breaks the pattern.
        """
        self.pattern = parse_pattern(pattern)
        if keep.dtype != torch.bool or keep.dim() != 2:
            raise ValueError(f"keep must be a boolean matrix [N, K], got {keep.dtype} of shape {tuple(keep.shape)}")
        broken = self.pattern.count_violations(keep)
        if broken:
            raise PatternError(f"keep breaks {self.pattern} in {broken} places: build it with pattern.project(scores)")
        self.shape = (keep.shape[0], keep.shape[1])
        self.bits = _pack_bits(keep)

    @property
    def keep(self) -> Tensor:
        """Boolean [N, K], True = kept."""
        table = torch.arange(256, device=self.bits.device)[:, None] >> torch.arange(8, device=self.bits.device) & 1
        spread = table.to(torch.bool).view(torch.int64).squeeze(1)[self.bits.int()].view(torch.bool)
        return spread[:, : self.shape[1]].contiguous()

    @property
    def sparsity(self) -> float:
        """Share of the entries removed."""
        keep = self.keep
        return 1 - float(keep.sum(dtype=torch.int64)) / max(keep.numel(), 1)

    def to(self, device: torch.device | str) -> "Mask":
        moved = object.__new__(Mask)
        moved.pattern, moved.shape, moved.bits = self.pattern, self.shape, self.bits.to(device)
        return moved

    @classmethod
    def from_bits(cls, pattern: Pattern | str, bits: Tensor, shape: tuple[int, int]) -> "Mask":
        """Rebuild from stored bits; the pattern is checked again."""
        raw = object.__new__(cls)
        raw.pattern, raw.shape, raw.bits = parse_pattern(pattern), shape, bits
        return cls(raw.pattern, raw.keep)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mask):
            return NotImplemented
        return (
            self.pattern == other.pattern
            and self.shape == other.shape
            and torch.equal(self.bits, other.bits.to(self.bits.device))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Mask({self.pattern}, {self.shape[0]}x{self.shape[1]}, sparsity={self.sparsity:.3f})"


def _pack_bits(keep: Tensor) -> Tensor:
    N, K = keep.shape
    padded = torch.nn.functional.pad(keep, (0, -K % 8)).contiguous().unflatten(1, (-(-K // 8), 8))
    return (padded.view(torch.int64).squeeze(-1) * _GATHER_BITS >> 56).to(torch.uint8)
