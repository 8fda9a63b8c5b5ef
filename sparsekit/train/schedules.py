"""How strong the pull on removed weights is, step by step (AST, arXiv 2407.20584, section 3.2).

lambda(t) = peak * min(t / T0, 1): small at first, so that masks explore; then at its peak, so that they settle. (The
paper's equation; its algorithm 1 swaps the names T0 and T1.)

The peak need not be searched for. In the decoupled form a weight that is removed at T0 and never comes back ends at
exp(-peak * sum of the learning rates after T0) of what it was, so a peak that makes the exponent 4 does the same for
every model, learning rate and loss: 2 % are left.
"""

from collections.abc import Callable
from dataclasses import dataclass

DECAYED_BY = 4.0
"""Exponent by which a weight that stays removed has decayed when masks freeze."""


@dataclass(frozen=True)
class MaskedDecay:
    """lambda(t).

    Attributes:
        peak: reached at `warmup_steps`, and kept.
        warmup_steps: T0, in optimizer steps.
    """

    peak: float
    warmup_steps: int

    def __call__(self, step: int) -> float:
        return self.peak * min(step / self.warmup_steps, 1.0) if self.warmup_steps > 0 else self.peak


def peak_for(learning_rates: Callable[[int], float], warmup_steps: int, end: int) -> float:
    """Return the peak at which weights decay by `DECAYED_BY` between `warmup_steps` and `end`.

    It is lower where a single step would overshoot: learning rate times lambda stays at most one half.

    Args:
        learning_rates: step -> learning rate.
        end: step at which masks freeze, or training ends.
    """
    rates = [learning_rates(step) for step in range(min(warmup_steps, max(end - 1, 0)), max(end, 1))]
    total, highest = sum(rates), max(rates)
    return min(DECAYED_BY / total, 0.5 / highest) if total > 0 else 0.0


def from_the_first_step(rates: Callable[[int], float]) -> Callable[[int], float]:
    """Return a schedule that does not begin at 0, as warm-ups do: that step would be for nothing.

    It gets half of the second step's rate.
    """
    return lambda step: rates(step) if step or rates(0) else rates(1) / 2
