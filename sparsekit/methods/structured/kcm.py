"""KCM (arXiv 2303.04185): filters of feed-forward layers, chosen without gradients and labels.

A filter is worth R2 · D2: how little the others can stand for it (`representative`, from its weights alone) times how
much it is heard on unlabelled text (the mean of |a_j|), each brought to [0, 1] within its layer. The best of all layers
stay; attention is not touched, so that what it costs is the least that a budget can ask for. Scales are then tuned
(`scaled`). The paper leaves the statistic of D2 and its normaliser open; they are fields here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.allocation import normalised
from sparsekit.methods.structured.base import Job, Reader, check_choice, check_positive, global_values
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.methods.structured.representative import (
    density_scores,
    kernel_matrix,
    median_sigma,
    principal_part,
    representative_scores,
)
from sparsekit.methods.structured.scaled import ScaledMethod

_MANY = 4096
"""Filters from which on the fixed point costs minutes a layer, and "auto" takes the shortcut."""


_LOOKED_AT = 512
"""Of a layer's filters, how many at most tell whether σ fits them: there are pairs enough among these."""


@dataclass(frozen=True, kw_only=True)
class KCM(ScaledMethod):
    """Kernelised convex masking of filters.

    Attributes:
        r2: "fixed_point" as in the paper; "density" for the same ranking in a fraction of the time; "none" for D2
            alone; "auto" for the fixed point where a layer has up to 4096 filters, and the density above.
        sigma: width of the kernel; the public code's 1.0 suits columns of norm 1, as BERT has them. None: the median
            distance of two filters.
        kernel_factor: f of exp(-f |x_i - x_j|²/σ²); 1, or 0.5.
        tolerance: α of the fixed point: it ends once the sum of C changes by less than this share.
        rank_share: of the directions of the filters that are looked at (0.75 in the public code, out of use there);
            None for all.
        d2: statistic of the activations: "abs" the mean of |a_j|, "rms", "mean", or "none" for R2 alone.
        normalise: within each layer: "minmax", or "l2", "log"; for one of the two scores alone "zscore", too.
    """

    r2: str = "auto"
    sigma: float | None = 1.0
    kernel_factor: float = 1.0
    tolerance: float = 0.01
    rank_share: float | None = None
    d2: str = "abs"
    normalise: str = "minmax"

    name = "kcm"
    kinds = ("channels",)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "r2", ("auto", "fixed_point", "density", "none"))
        check_choice(self, "d2", ("abs", "rms", "mean", "none"))
        check_choice(self, "normalise", ("minmax", "l2", "log", "zscore"))
        check_positive(self, "kernel_factor", "tolerance", *(["sigma"] if self.sigma is not None else []))
        if self.rank_share is not None and not 0 < self.rank_share <= 1:
            raise ValueError(f"rank_share={self.rank_share!r} must be a share of the directions, as 0.75, or None")
        if self.r2 == self.d2 == "none":
            raise ValueError("r2='none' and d2='none' leave no score: ask for one of them")
        if "none" not in (self.r2, self.d2) and (self.normalise == "zscore" or self.d2 == "mean"):
            raise ValueError(
                f"normalise={self.normalise!r}, d2={self.d2!r}: a product of two negative scores would rank high; use "
                "'minmax' and 'abs', or one score alone"
            )

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        assert inputs is not None
        score = torch.ones(reader.width.num_units, dtype=torch.float64)
        if self.r2 != "none":
            score = score * normalised(self.representative(reader.w_NK.T).double().cpu(), self.normalise)
        if self.d2 != "none":
            heard = {"abs": inputs.mean_abs, "rms": inputs.rms, "mean": inputs.mean}[self.d2]
            score = score * normalised(heard.double().cpu(), self.normalise)
        return score

    def score(self, job: Job) -> dict[str, Tensor]:
        found = super().score(job)
        if self.r2 != "none" and self.sigma is not None:
            job.notes += self._unfit(job)
        return found

    def _unfit(self, job: Job) -> list[str]:
        """Say where the kernel tells no filters from others, for σ is not of the size of their distances."""
        assert self.sigma is not None
        medians = {}
        for width in job.widths:
            x_Nd = job.reader(width).w_NK.T
            distance = median_sigma(x_Nd[:: -(-len(x_Nd) // _LOOKED_AT)])
            medians[width.name] = math.exp(-self.kernel_factor * min((distance / self.sigma) ** 2, 700))
        wrong = [name for name, median in medians.items() if not 0.1 <= median <= 0.9]
        if not wrong:
            return []
        return [
            f"sigma={self.sigma:g} does not fit {len(wrong)} of {len(medians)} layers: of {wrong[0]} the median kernel "
            f"value is {medians[wrong[0]]:.2g}, so that R2 says little there; sigma=None takes the median distance"
        ]

    def representative(self, x_Nd: Tensor) -> Tensor:
        """Return R2 of filters, one in each row, [N]."""
        if self.rank_share is not None:
            x_Nd = principal_part(x_Nd, self.rank_share)
        K = kernel_matrix(x_Nd, median_sigma(x_Nd) if self.sigma is None else self.sigma, self.kernel_factor)
        if self.r2 == "density" or (self.r2 == "auto" and len(K) > _MANY):
            return density_scores(K)
        return representative_scores(K, tolerance=self.tolerance)[0]

    def values(self, job: Job) -> dict[str, Tensor]:
        return global_values(job.scores)


METHODS.register("kcm", KCM)
