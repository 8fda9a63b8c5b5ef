"""lambda(t), and the peak that needs no search against a weight that decays."""

import math

import pytest

from sparsekit.train.schedules import DECAYED_BY, MaskedDecay, begun_anew, from_the_first_step, peak_for


def test_it_rises_from_zero_in_a_line_and_then_stays():
    decay = MaskedDecay(peak=3.0, warmup_steps=20)
    assert decay(0) == 0 and decay(20) == decay(21) == decay(10**6) == 3.0
    steps = [decay(step + 1) - decay(step) for step in range(20)]
    assert steps == pytest.approx([3.0 / 20] * 20)


def test_without_warm_up_it_is_at_its_peak_at_once():
    assert MaskedDecay(peak=3.0, warmup_steps=0)(0) == 3.0


def cosine(peak, warmup, steps):
    """A learning rate as in training: a line up, half a cosine down."""

    def rate(step):
        if step < warmup:
            return peak * step / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    return rate


def what_is_left(rate, decay, steps):
    """A weight of 1 that is removed throughout, step by step."""
    weight = 1.0
    for step in steps:
        weight -= rate(step) * decay(step) * weight
    return weight


@pytest.mark.parametrize("rate", [lambda step: 1e-3, cosine(2e-4, 50, 1000), cosine(2e-2, 0, 1000)])
@pytest.mark.parametrize("start,end", [(250, 850), (0, 850), (250, 1000), (600, 700)])
def test_the_peak_leaves_two_percent_of_what_stays_removed(rate, start, end):
    """Whatever the learning rates; a little less, for each step takes a share of what is left."""
    decay = MaskedDecay(peak_for(rate, start, end, end), start)
    left = what_is_left(rate, decay, range(start, end))
    assert 0.9 * math.exp(-DECAYED_BY) < left < math.exp(-DECAYED_BY)


def test_the_peak_is_lower_where_a_step_would_overshoot():
    """With few steps left no step may take more than half, and what is left never changes its sign."""
    rate = cosine(1e-3, 2, 12)
    peak = peak_for(rate, 8, 11, 12)
    assert max(rate(step) * MaskedDecay(peak, 8)(step) for step in range(12)) == pytest.approx(0.5)
    assert 0 < what_is_left(rate, MaskedDecay(peak, 8), range(8, 11)) < 1


@pytest.mark.parametrize("start,end", [(10, 10), (12, 10), (0, 0), (0, 1), (5, 1)])
def test_the_peak_is_finite_where_there_are_no_steps_to_decay_in(start, end):
    peak = peak_for(lambda step: 1e-3, start, end, end)
    assert 0 < peak
    assert max((1e-3 * MaskedDecay(peak, start)(step) for step in range(end)), default=0) <= 0.5
    assert peak_for(lambda step: 0.0, start, end, end) == 0.0


@pytest.mark.parametrize("warmup,end", [(0, 0), (10, 0), (10, 1), (10, 5), (0, 1), (10, 40)])
def test_no_step_of_the_run_overshoots_however_early_masks_freeze(warmup, end):
    """Weights are pulled after the masks froze, too, and at rates that are higher than those before, in a warm-up."""
    rate, num_steps = cosine(2e-2, 20, 40), 40
    decay = MaskedDecay(peak_for(rate, warmup, end, num_steps), warmup)
    assert 0 < max(rate(step) * decay(step) for step in range(num_steps)) <= 0.5


@pytest.mark.parametrize("warmup", [1, 2, 5])
def test_no_step_is_for_nothing(warmup):
    def cosine(step):
        return step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (20 - warmup))) / 2

    rates = from_the_first_step(cosine)
    assert cosine(0) == 0 < rates(0) == cosine(1) / 2
    assert [rates(step) for step in range(1, 20)] == [cosine(step) for step in range(1, 20)]


def test_a_schedule_without_warm_up_stays_as_it_is():
    assert [from_the_first_step(lambda step: 0.9**step)(step) for step in range(4)] == [1, 0.9, 0.9**2, 0.9**3]


def test_a_phase_begins_anew_and_ends_at_nothing():
    rates = begun_anew(lambda step: 0.01, start=10, end=30, peak=0.2)
    assert [rates(step) for step in range(10)] == [0.01] * 10
    found = [rates(step) for step in range(10, 31)]
    assert found[0] == 0.2 and found[10] == pytest.approx(0.1) and found == sorted(found, reverse=True)
    assert found[-1] == 0.01, "where the schedule itself is above, it stays"
    assert begun_anew(lambda step: 0.5, 0, 5, 0.2)(0) == 0.5
    assert begun_anew(lambda step: 0.0, 5, 5, 0.2)(5) == 0.2, "a phase of no steps"
