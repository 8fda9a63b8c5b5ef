"""Which zeros are legal.

A pattern says, for a weight W [N, K] (out_features x in_features), which sets of kept entries are allowed. Patterns
parse from and print to the words used in the API: "2:4", "64x64", "unstructured".
"""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.registry import unknown


class Pattern(ABC):
    """The legal sets of kept entries of a weight [N, K]."""

    @abstractmethod
    def project(self, scores: Tensor, sparsity: float = 0.5) -> Tensor:
        """Return the legal `keep` with the largest total score.

        Args:
            scores: [N, K], higher is kept first; ties go to the lower index.
            sparsity: share of the entries to remove; `NM` fixes its own and takes no other.
        Returns:
            Boolean [N, K], True = kept.
        """

    @abstractmethod
    def count_violations(self, keep: Tensor) -> int:
        """Return how many units (groups, blocks) of `keep` [N, K] break the pattern."""

    def fixed_sparsity(self) -> float | None:
        """Return the sparsity that the pattern implies, or None where it is free to choose."""
        return None


@dataclass(frozen=True)
class NM(Pattern):
    """At most `n` kept in every `m` consecutive entries of a row (along in_features).

    Where K is not a multiple of `m`, the last group of each row is shorter and may keep up to `n` as well.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ValueError(f"pattern {self.n}:{self.m} keeps {self.n} of {self.m}: N:M needs 0 < N < M, as in '2:4'")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    def fixed_sparsity(self) -> float:
        return 1 - self.n / self.m

    def project(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        _check_scores(scores)
        if sparsity is not None and sparsity not in (0.5, self.fixed_sparsity()):
            raise ValueError(f"pattern {self} removes {self.fixed_sparsity():.3g} of the weights: sparsity={sparsity}")
        N, K = scores.shape
        groups = F.pad(scores.float(), (0, -K % self.m), value=-torch.inf).unflatten(1, (-(-K // self.m), self.m))
        keep = _rank(groups) < self.n if self.m <= 8 else _rank_by_sorting(groups) < self.n
        return keep.flatten(1)[:, :K].contiguous()

    def count_violations(self, keep: Tensor) -> int:
        N, K = keep.shape
        groups = F.pad(keep, (0, -K % self.m)).unflatten(1, (-(-K // self.m), self.m))
        counts = groups[..., 0].to(torch.int32)
        for position in range(1, self.m):  # adding slices is many times faster than a sum over a short dimension
            counts += groups[..., position]
        return int((counts > self.n).sum())


@dataclass(frozen=True)
class Block(Pattern):
    """Whole `rows` x `columns` tiles are kept or removed; tiles at the edges may be smaller."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise ValueError(f"pattern {self}: both sides of a block must be at least 1, as in '64x64'")

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}"

    def project(self, scores: Tensor, sparsity: float = 0.5) -> Tensor:
        _check_scores(scores)
        check_sparsity(sparsity)
        N, K = scores.shape
        totals = self._tiles(scores.float()).sum(dim=(1, 3))
        kept_tiles = _keep_largest(totals, sparsity)
        return kept_tiles.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)[:N, :K].contiguous()

    def count_violations(self, keep: Tensor) -> int:
        counts = self._tiles(keep.int()).sum(dim=(1, 3))
        sizes = self._tiles(torch.ones_like(keep, dtype=torch.int32)).sum(dim=(1, 3))
        return int(((counts != 0) & (counts != sizes)).sum())

    def _tiles(self, x_NK: Tensor) -> Tensor:
        N, K = x_NK.shape
        padded = F.pad(x_NK, (0, -K % self.columns, 0, -N % self.rows))
        return padded.view(-(-N // self.rows), self.rows, -(-K // self.columns), self.columns)


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any entry may be removed; the sparsity is met over the whole weight."""

    def __str__(self) -> str:
        return "unstructured"

    def project(self, scores: Tensor, sparsity: float = 0.5) -> Tensor:
        _check_scores(scores)
        check_sparsity(sparsity)
        return _keep_largest(scores, sparsity)

    def count_violations(self, keep: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class _Whole(Pattern):
    """Parts of a model that go altogether; the weights that are left are dense."""

    def project(self, scores: Tensor, sparsity: float = 0.5) -> Tensor:
        raise ValueError(
            f"pattern {self} is no pattern of the entries of a weight: it takes whole parts out of a model. Use "
            "method='contribution' or another structured method"
        )

    def count_violations(self, keep: Tensor) -> int:
        return 0


@dataclass(frozen=True)
class Structured(_Whole):
    """Heads, channels or hidden dimensions go: the model becomes narrower."""

    def __str__(self) -> str:
        return "structured"


@dataclass(frozen=True)
class Depth(_Whole):
    """Blocks go: the model becomes shorter."""

    def __str__(self) -> str:
        return "depth"


EXAMPLES = ["2:4", "1:4", "4:8", "64x64", "unstructured", "structured", "depth"]
"""Patterns that messages offer; any N:M and any RxC parse."""


def parse_pattern(pattern: str | Pattern) -> Pattern:
    """Return the Pattern that a word means.

    Raises:
        ValueError: the word is none of "N:M", "RxC", "unstructured", "structured", "depth".
    """
    if isinstance(pattern, Pattern):
        return pattern
    if isinstance(pattern, str):
        word = pattern.strip().lower()
        if word in (words := {str(each): each for each in (Unstructured(), Structured(), Depth())}):
            return words[word]
        if found := re.fullmatch(r"(\d+):(\d+)", word):
            return NM(int(found[1]), int(found[2]))
        if found := re.fullmatch(r"(\d+)x(\d+)", word):
            return Block(int(found[1]), int(found[2]))
    raise ValueError(
        unknown("pattern", pattern, EXAMPLES) + " Any N:M with 0 < N < M and any RxC block are patterns too."
    )


def check_sparsity(sparsity: float) -> None:
    """Raise ValueError unless 0 <= sparsity < 1."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} is not a share of weights to remove: use a number in [0, 1), as 0.5")


def _rank(groups: Tensor) -> Tensor:
    """Return, for each entry of [..., m], how many come before it: larger ones, and equal ones at a lower index.

    Each pair is compared once, for all groups at a time; for small m that is many times faster than sorting.
    """
    m = groups.shape[-1]
    entries = [groups[..., i].contiguous() for i in range(m)]
    ranks = [torch.zeros_like(entry, dtype=torch.int8) for entry in entries]
    for i in range(m):
        for j in range(i + 1, m):
            first_wins = entries[i] >= entries[j]
            ranks[j] += first_wins
            ranks[i] += ~first_wins
    return torch.stack(ranks, dim=-1)


def _rank_by_sorting(groups: Tensor) -> Tensor:
    """The same for wide groups; a stable descending sort keeps the lower index first among equals."""
    order = groups.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(groups.shape[-1], device=groups.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, places)


def _keep_largest(scores: Tensor, sparsity: float) -> Tensor:
    """Keep all but round(sparsity * numel) entries, the smallest ones; among equals the lower index stays."""
    flat = scores.reshape(-1).float()
    num_kept = flat.numel() - round(sparsity * flat.numel())
    keep = torch.zeros(flat.shape, dtype=torch.bool, device=scores.device)
    keep[flat.sort(descending=True, stable=True).indices[:num_kept]] = True
    return keep.view(scores.shape)


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be a matrix [N, K], got shape {tuple(scores.shape)}")
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN, so there is no largest: mend the weights or the activations first")
