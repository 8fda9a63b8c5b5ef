"""How strong the pull on removed weights is, step by step (AST, arXiv 2407.20584, section 3.2).

lambda(t) = peak * min(t / T0, 1): small at first, so that masks explore; then at its peak, so that they settle. (The
paper's equation; its algorithm 1 swaps the names T0 and T1.)

The peak need not be searched for. In the decoupled form a weight that is removed at T0 and never comes back ends at
exp(-peak * sum of the learning rates after T0) of what it was, so a peak that makes the exponent 4 does the same for
every model, learning rate and loss: 2 % are left.
"""

import math
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


def begun_anew(rates: Callable[[int], float], start: int, end: int, peak: float) -> Callable[[int], float]:
    """Return a schedule that falls once more from `start` on, as a cosine from `peak` to 0 at `end`, where it is lower.

    For weights that are put on a grid of 4 bits late in a run: at the rates that are left by then, none gets as far as
    the next number of the grid.
    """

    def rate(step: int) -> float:
        if step < start:
            return rates(step)
        return max(rates(step), peak * 0.5 * (1 + math.cos(math.pi * (step - start) / max(end - start, 1))))

    return rate


def peak_for(learning_rates: Callable[[int], float], warmup_steps: int, end: int, num_steps: int) -> float:
    """Return the peak at which weights decay by `DECAYED_BY` between `warmup_steps` and `end`.

    It is lower where a single step would overshoot: learning rate times lambda stays at most one half in the whole run.

    Args:
        learning_rates: step -> learning rate.
        end: step at which masks freeze, or training ends.
        num_steps: of the whole run; weights are pulled after `end`, too.
    """
    total = sum(learning_rates(step) for step in range(min(warmup_steps, max(end - 1, 0)), max(end, 1)))
    share = MaskedDecay(1.0, warmup_steps)
    highest = max(learning_rates(step) * share(step) for step in range(max(num_steps, 1)))
    return min((limit / most for limit, most in ((DECAYED_BY, total), (0.5, highest)) if most > 0), default=0.0)


def from_the_first_step(rates: Callable[[int], float]) -> Callable[[int], float]:
    """Return a schedule that does not begin at 0, as warm-ups do: that step would be for nothing.

    It gets half of the second step's rate.
    """
    return lambda step: rates(step) if step or rates(0) else rates(1) / 2
