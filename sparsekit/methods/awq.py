"""AWQ (Lin et al., MLSys 2024, arXiv 2306.00978) for sparse weights: input channels scaled so that rounding costs less.

x W^T = (x / s) (W s)^T, and 1 / s costs nothing where it can be folded into what produces x (`sparsekit.archs`): norms,
the rows of v and of up. A column that is multiplied by s > 1 is rounded s times finer, for as long as it does not
stretch the grid of all. So s = rms(x)^a, channel by channel, with the a from 0 to 1 that leaves the least error in the
outputs of all layers that read the channels (section 3.2, eq. 4 and 5). Of s = rms(x)^0 = 1 nothing is folded.

Scales come after the mask: zeros stay zeros whatever they are multiplied by, and weights that are dense as yet are
pruned first. The error is that of rounding to nearest where weights are to be rounded so. Where the columns to come
make up for errors (SparseGPT, GPTQ), what counts is what they cannot make up for: e_k^2 / U_kk^2 for an error e_k in
column k, with U from `inverse_factor`. Judged by errors to nearest, scales make that worse as often as better.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.archs import Coupling
from sparsekit.calibration.statistics import Hessian, Statistics
from sparsekit.methods.base import METHODS, Decision
from sparsekit.methods.grid import is_quantised, round_to_nearest
from sparsekit.methods.inverse_factor import inverse_factor
from sparsekit.methods.sparsegpt import SparseGPT

_STEPS = 20
"""Steps of a from 0 to 1 (section 3.2)."""
_WEAKEST = 1e-4
"""Share of the strongest channel's rms below which all channels count as equally weak."""


@dataclass(frozen=True, kw_only=True)
class AWQ(SparseGPT):
    """Rounding to a quantised format with scaled inputs; weights that break the pattern are first pruned by SparseGPT.

    Without a quantised format there is nothing to scale for, and this is SparseGPT, as `prune_` warns.

    Attributes:
        compensate: let the columns to come make up for what rounding does to one, as SparseGPT and GPTQ do. False:
            round to nearest, as AWQ is published, on the scales with the least error.
    """

    compensate: bool = True

    name = "awq"

    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        assert isinstance(statistics, Hessian), "AWQ needs the Hessian of the inputs"
        if self.compensate or not is_quantised(self.format):
            return super().decide(w_NK, statistics)
        pruned = self.pruned(w_NK, statistics)
        w_NK = w_NK if pruned.weight is None else pruned.weight
        rounded, scales = round_to_nearest(w_NK, pruned.keep, self.format, statistics.matrix.diagonal())
        return Decision(pruned.keep, rounded, scales, pruned.notes)

    def pruned(self, w_NK: Tensor, statistics: Hessian) -> Decision:
        """Return what SparseGPT makes of a weight without rounding it; one that obeys the pattern stays as it is."""
        if self.parsed_pattern.count_violations(w_NK != 0) == 0:
            return Decision(self.project(w_NK.abs()))
        unrounded = SparseGPT(
            pattern=self.pattern,
            sparsity=self.sparsity,
            dampening_frac=self.dampening_frac,
            block_size=self.block_size,
            strongest_first=is_quantised(self.format) if self.strongest_first is None else self.strongest_first,
        )
        return unrounded.decide(w_NK, statistics)

    def input_scales(self, coupling: Coupling, weights: Sequence[Tensor], statistics: Hessian) -> Tensor | None:
        """Return the scales of a coupling's channels, fp32 [C], their largest times their smallest 1.

        Args:
            coupling: one that `can_scale`.
            weights: of its consumers, [N, K] each, pruned.
            statistics: of the consumers' inputs.
        Returns:
            None where no scales are better than none.
        """
        H, format = statistics.matrix, self.format
        assert is_quantised(format), "scales are for a quantised format"
        source = coupling.source.to(H.device)
        rms = H.new_zeros(coupling.num_channels).index_add_(0, source, H.diagonal()).sqrt()
        costs = self._costs(statistics)
        if costs is None or not rms.any():
            return None
        logs = rms.clamp_min(_WEAKEST * rms.max()).log()
        logs -= (logs.max() + logs.min()) / 2

        def error(scales: Tensor) -> float:
            return math.fsum(rounding_error(w_NK, scales[source], costs, format) for w_NK in weights)

        candidates = [(logs * step / _STEPS).exp() for step in range(_STEPS + 1)]
        errors = [error(scales) for scales in candidates]
        best = errors.index(min(errors))
        return candidates[best] if best else None

    def _costs(self, statistics: Hessian) -> Tensor | None:
        """Return what errors in a row of a weight cost: [K, K] for a quadratic form, [K] for its diagonal."""
        if not self.compensate:
            return statistics.matrix
        order = self._order(statistics)
        factor = inverse_factor(statistics, self.dampening_frac, order)
        if factor is None:
            return None
        costs_K = factor.U.diagonal().square().reciprocal()
        return costs_K if order is None else costs_K[order.argsort()]


def rounding_error(w_NK: Tensor, scales_K: Tensor, costs: Tensor, format: str) -> float:
    """Return the sum over rows of e C e^T, e the error of a weight that is rounded to nearest as w * scales.

    Args:
        w_NK: the weight; its zeros stay zeros.
        scales_K: of its columns.
        costs: C [K, K], or its diagonal [K].
    """
    scaled = w_NK.float() * scales_K
    diagonal = costs if costs.dim() == 1 else costs.diagonal()
    rounded, _ = round_to_nearest(scaled, scaled != 0, format, diagonal / scales_K.square())
    errors = (rounded - scaled) / scales_K
    weighted = errors * costs if costs.dim() == 1 else errors @ costs
    return float((weighted * errors).sum(dtype=torch.float64))


METHODS.register("awq", AWQ)
