"""Which teacher when."""

import math

import pytest
import torch

from sparsekit.errors import CheckpointError
from sparsekit.train.snapshots import Snapshots
from sparsekit.train.teacher_schedule import Distances, TeacherSchedule

pytest.importorskip("peft", reason="peft is not installed")


class Sparsities(Snapshots):
    """Snapshots of nothing, that know their sparsity."""

    def add(self, sparsity):
        return self.take(sparsity, {"x": torch.zeros(1)}, {})


def curve(target, rise):
    """Return the sparsity after a step, rising in a straight line that passes all marks."""
    return lambda step: min(target * (step + 1) / rise, target)


def run(schedule, snapshots, sparsity, num_steps, distances=None):
    """Return the sparsity of each step's teacher, in per cent; 0 for the intact model."""
    found = []
    for index in range(num_steps):
        teacher = schedule.teacher(index, distances and (lambda index=index: distances(index)))
        assert schedule.teacher_sparsity == (0 if teacher is None else teacher.sparsity)
        found.append(round(100 * schedule.teacher_sparsity))
        schedule.observe(index, sparsity(index), lambda index=index: snapshots.add(sparsity(index)))
    return found


@pytest.mark.parametrize("target,num_marks,first,share", [(0.5, 49, 41, 0.2), (0.25, 24, 16, 0.4), (0.2, 19, 11, 0.5)])
def test_the_paper_s_walk(target, num_marks, first, share):
    snapshots, rise, period = Sparsities(), 4 * (num_marks + 1), 3
    num_steps = rise + period * (num_marks + 1)
    schedule = TeacherSchedule("paper", snapshots, target=target, num_steps=num_steps)
    teachers = run(schedule, snapshots, curve(target, rise), num_steps)
    assert len(snapshots) == num_marks
    assert [round(100 * s) for s in snapshots.sparsities] == list(range(1, num_marks + 1))
    for index, teacher in enumerate(teachers[:rise]):  # 9 to 10 points behind
        passed = min(index // 4, num_marks)
        assert teacher == max(passed - 9, 0), index
    walk = teachers[rise:]
    assert walk[0] == first
    assert walk == [max(first - math.ceil(i / period), 0) for i in range(len(walk))]
    assert walk.count(0) == pytest.approx(share * len(walk), abs=1)


def test_at_a_tenth_the_walk_is_one_step():
    snapshots = Sparsities()
    schedule = TeacherSchedule("paper", snapshots, target=0.1, num_steps=200)
    teachers = run(schedule, snapshots, curve(0.1, 100), 200)
    assert teachers == [0] * 100 + [1] + [0] * 99


def test_too_low_a_target_is_said():
    with pytest.warns(UserWarning, match="the target of 8.0% is less than 10 marks"):
        schedule = TeacherSchedule("paper", snapshots := Sparsities(), target=0.08, num_steps=60)
    assert not any(run(schedule, snapshots, curve(0.08, 30), 60))


def test_few_steps_left_are_walked_faster():
    snapshots = Sparsities()
    schedule = TeacherSchedule("paper", snapshots, target=0.5, num_steps=131)
    teachers = run(schedule, snapshots, curve(0.5, 100), 131)  # 31 steps for 50 marks
    assert teachers[100:] == [max(31 - i - 10 + 1, 0) for i in range(31)]


def test_a_target_that_is_not_reached_is_walked_back_from():
    snapshots = Sparsities()
    schedule = TeacherSchedule("paper", snapshots, target=0.5, num_steps=200, warmup_steps=40)
    teachers = run(schedule, snapshots, curve(0.3001, 60), 200)
    assert len(snapshots) == 30
    assert teachers[60:160] == [21] * 100  # until three quarters of what follows the warm-up
    assert teachers[160:] == [max(min(22, 31 - i), 0) for i in range(40)]


def test_a_projection_reaches_the_target():
    snapshots = Sparsities()
    schedule = TeacherSchedule("paper", snapshots, target=0.3, num_steps=90)
    run(schedule, snapshots, curve(0.2501, 50), 60)
    schedule.reach(60)
    later = [schedule.teacher(step) for step in range(60, 90)]
    assert later[0].sparsity == pytest.approx(0.17, abs=0.006) and later[-1] is None
    assert not schedule.observe(61, 0.29, lambda: snapshots.add(0.29))


def test_one_snapshot_stands_for_the_marks_leapt_over():
    snapshots = Sparsities()
    schedule = TeacherSchedule("paper", snapshots, target=0.2, num_steps=40, lag=3)
    leaps = [0.0, 0.005, 0.012, 0.012, 0.075, 0.08, 0.02, 0.19, 0.31]
    took = [schedule.observe(i, s, lambda s=s: snapshots.add(s)) for i, s in enumerate(leaps)]
    assert took == [False, False, True, False, True, True, False, True, False]
    assert snapshots.sparsities == [0.012, 0.075, 0.08, 0.19]
    teachers = [round(100 * schedule.teacher(i).sparsity) for i in range(9, 36)]
    assert teachers[0] == 19 and set(teachers) <= {1, 8, 19} and teachers == sorted(teachers, reverse=True)


@pytest.mark.parametrize("kind", ["intact", "none"])
def test_the_intact_model_alone_or_nobody(kind):
    snapshots = Sparsities()
    schedule = TeacherSchedule(kind, snapshots, target=0.5, num_steps=60)
    assert not any(run(schedule, snapshots, curve(0.5, 30), 60)) and not len(snapshots)
    assert schedule.teaches == (kind == "intact")


def test_the_nearest_that_is_far_enough():
    far = Distances(intact=0.8, snapshots=(0.7, 0.4, 0.3, 0.3, 0.1))
    assert [far.nearest(floor) for floor in (0, 0.2, 0.3, 0.35, 0.5, 0.75)] == [4, 3, 3, 1, 0, None]
    assert Distances(0.2, (0.2, 0.5)).nearest(0.1) is None  # the intact model is as near
    assert Distances(0.2, ()).nearest(0.1) is None
    assert Distances(float("nan"), (float("nan"),)).nearest(0.1) is None


def test_nearest_gives_way_to_harder_ones_and_ends_with_the_intact_model():
    snapshots, measured = Sparsities(), []

    def distances(step):
        measured.append(step)
        behind = [max(0.5 * min(step / 50, 1) - s, 0) for s in [0.0, *snapshots.sparsities]]
        return Distances(behind[0], tuple(behind[1:]))

    schedule = TeacherSchedule(
        "nearest", snapshots, target=0.5, num_steps=200, interval=10, floor=0.1, floor_share=0.5, intact_share=0.25
    )
    teachers = run(schedule, snapshots, curve(0.5, 50), 200, distances)
    assert measured == list(range(10, 150, 10))  # no measuring where there is nothing to choose
    assert all(teachers[i] == teachers[i - i % 10] for i in range(150))
    settled = teachers[60:150:10]
    assert settled == sorted(settled, reverse=True) and settled[0] in (14, 15) and settled[-1] < 5
    assert not any(teachers[150:]) and max(teachers) > 10
    for index in range(10, 150, 10):  # the nearest at least as far as half of the way, or more, later on
        share = 0.5 + 0.5 * index / 150
        sparsity = 0.5 * min(index / 50, 1)
        floor = max(0.1, share * sparsity)
        marks = [s for s in snapshots.sparsities if s < sparsity and sparsity - s >= floor]
        assert teachers[index] == round(100 * max(marks, default=0)), index


def test_nearest_needs_its_measurements():
    snapshots = Sparsities()
    schedule = TeacherSchedule("nearest", snapshots, target=0.5, num_steps=60, interval=5)
    snapshots.add(0.1)
    with pytest.raises(ValueError, match="distances=None"):
        schedule.teacher(5)


@pytest.mark.parametrize("kind", ["paper", "nearest"])
@pytest.mark.parametrize("stop", [37, 91, 140])
def test_a_schedule_goes_on_where_it_stopped(kind, stop):
    def made():
        snapshots = Sparsities()
        return snapshots, TeacherSchedule(kind, snapshots, target=0.3, num_steps=150, interval=7, intact_share=0.1)

    def distances_of(snapshots):
        return lambda step: Distances(1.0, tuple(1 - 2 * s for s in snapshots.sparsities))

    sparsity = curve(0.3, 90)
    snapshots, schedule = made()
    whole = run(schedule, snapshots, sparsity, 150, distances_of(snapshots))
    first, second = made(), made()
    begun = run(first[1], first[0], sparsity, stop, distances_of(first[0]))
    second[0].load(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    rest = []
    for index in range(stop, 150):
        second[1].teacher(index, lambda index=index: distances_of(second[0])(index))
        rest.append(round(100 * second[1].teacher_sparsity))
        second[1].observe(index, sparsity(index), lambda index=index: second[0].add(sparsity(index)))
    assert begun + rest == whole
    with pytest.raises(CheckpointError, match="load those of the same checkpoint first"):
        made()[1].load_state_dict(first[1].state_dict())


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"kind": "nearby"}, "nearest"),
        ({"target": 0.0}, "target=0.0 must lie between 0 and 1"),
        ({"spacing": 1.5}, "spacing=1.5"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"lag": 0}, "lag=0"),
        ({"interval": 0}, "interval=0"),
        ({"warmup_steps": 61}, "warmup_steps=61 must be from 0 to the 60 steps"),
        ({"floor": -0.1}, "floor=-0.1"),
        ({"floor_share": 1.5}, "floor_share=1.5"),
        ({"intact_share": float("nan")}, "intact_share=nan"),
    ],
)
def test_arguments_out_of_range(changes, message):
    options = {"kind": "paper", "target": 0.5, "num_steps": 60, **changes}
    with pytest.raises(ValueError, match=message):
        TeacherSchedule(options.pop("kind"), Snapshots(), **options)
