"""Which teacher when, of the snapshots of a student's way (NutePrune, arXiv 2402.09773).

"paper" teaches with the snapshot that the student was `lag` marks ago, as long as its sparsity rises; once the target
is reached, the teacher walks back, mark by mark in equal times, and what is left is taught by the intact model. Where
the sparsity leaps over marks, the one snapshot stands for all of them. Where the target is not reached, the walk begins
all the same, at `LATEST_WALK`.

"nearest" goes by what was measured on a few held tokens: a teacher that says what the student says already has nothing
to teach, and one that is far away cannot be followed. The teacher is the nearest one, in KL(teacher || student), whose
distance is at least

    max(floor, share * that of the intact model),

and the intact model where there is none. So a teacher that the student has caught up with gives way to a harder one.
The share rises in a straight line from `floor_share` at the first step to 1, where no snapshot is far enough, and
stays there for the last `intact_share` of the steps. Where a run goes in stages, each is such a rise.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sparsekit.errors import CheckpointError
from sparsekit.registry import unknown
from sparsekit.train.snapshots import Snapshot, Snapshots

TEACHERS = ("nearest", "paper", "intact", "none")

LATEST_WALK = 0.75
"""Share of the steps after the warm-up at which the paper's teacher walks back, though the target be not reached."""

_HAIR = 1e-6
"""In units of the spacing: what rounding may make of a mark."""


@dataclass(frozen=True)
class Distances:
    """KL(teacher || student) in nats per token, of the intact model and of each snapshot."""

    intact: float
    snapshots: tuple[float, ...]

    def nearest(self, floor: float) -> int | None:
        """Return the nearest snapshot that is at least `floor` away, the latest of several; None for the intact model,
        where there is no such one, or where it is itself as near."""
        far = [index for index, distance in enumerate(self.snapshots) if distance >= floor]
        found = min(far, key=lambda index: (self.snapshots[index], -index), default=None)
        return None if found is None or self.snapshots[found] >= self.intact else found


class TeacherSchedule:
    """Which teacher when; see the module's text.

    Args:
        kind: "paper", "nearest", "intact" (always) or "none" (no teacher at all).
        snapshots: where `observe` puts what it takes.
        target: sparsity that the run is to reach.
        num_steps: steps of the whole run.
        warmup_steps: steps over which the target rises.
        spacing: sparsity from one mark to the next, at each of which a snapshot is taken.
        lag: of "paper": the student is this many marks ahead of its teacher.
        interval: of "nearest": steps from one measurement to the next.
        floor: of "nearest", nats per token.
        floor_share: of "nearest", of the distance of the intact model.
        intact_share: of "nearest", of the steps.
    Attributes:
        index: of the teacher that was asked for last; None for the intact model.
        num_taught: steps in which a snapshot taught.
        stage: first step, and the one after the last, over which the share of "nearest" rises; the whole run at first.
    Raises:
        ValueError: an argument is out of range.
    Warns where the target is below what the lag takes, so that "paper" never teaches with a snapshot.
    """

    def __init__(
        self,
        kind: str,
        snapshots: Snapshots,
        *,
        target: float,
        num_steps: int,
        warmup_steps: int = 0,
        spacing: float = 0.01,
        lag: int = 10,
        interval: int = 20,
        floor: float = 0.02,
        floor_share: float = 0.5,
        intact_share: float = 0.5,
    ) -> None:
        if kind not in TEACHERS:
            raise ValueError(unknown("kind", kind, list(TEACHERS)))
        for name, share in (("target", target), ("spacing", spacing)):
            if not 0 < share < 1:
                raise ValueError(f"{name}={share} must lie between 0 and 1, as 0.2")
        for name, share in (("floor_share", floor_share), ("intact_share", intact_share)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name}={share} must be a share from 0 to 1, as 0.5")
        for name, number in (("num_steps", num_steps), ("lag", lag), ("interval", interval)):
            if number < 1:
                raise ValueError(f"{name}={number} must be a whole number of at least 1")
        if not 0 <= warmup_steps <= num_steps:
            raise ValueError(f"warmup_steps={warmup_steps} must be from 0 to the {num_steps} steps of the run")
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor={floor} must be at least 0 nats per token, as 0.02")
        self.kind, self.snapshots = kind, snapshots
        self.target, self.num_steps, self.warmup_steps = target, num_steps, warmup_steps
        self.spacing, self.lag, self.interval = spacing, lag, interval
        self.floor, self.floor_share, self.intact_share = floor, floor_share, intact_share
        self.index: int | None = None
        self.num_taught = 0
        self.stage = 0, num_steps
        self._passed: list[int] = []  # mark -> its snapshot
        self._walk: tuple[int, int] | None = None  # steps and marks when the walk back began
        self._num_marks = max(math.ceil(target / spacing - _HAIR) - 1, 0)  # all below the target
        if kind == "paper" and self._num_marks + 1 < lag:
            warnings.warn(
                f"the target of {target:.1%} is less than {lag} marks of {spacing:.1%} away: the intact model teaches "
                "throughout. Lower teacher_lag or teacher_spacing, or use 'nearest'",
                stacklevel=2,
            )

    @property
    def teaches(self) -> bool:
        """False for "none": there is no teacher to run."""
        return self.kind != "none"

    @property
    def collects(self) -> bool:
        """Whether snapshots are taken for teaching."""
        return self.kind in ("paper", "nearest")

    def teacher(self, step: int, distances: Callable[[], Distances] | None = None) -> Snapshot | None:
        """Return the teacher of a step (from 0), None for the intact model; ask once a step, before its forward passes.

        Args:
            distances: `lambda: probe.distances(snapshots, gates.paper_masks())`; "nearest" calls it where a measurement
                is due, the others never.
        """
        if self.kind == "paper":
            self.index = self._on_the_walk(step)
        elif self.kind == "nearest":
            self.index = self._nearest(step, distances)
        self.num_taught += self.index is not None
        return None if self.index is None else self.snapshots[self.index]

    @property
    def teacher_sparsity(self) -> float:
        """Sparsity of the teacher that was returned last, 0 for the intact model; for the log."""
        return 0.0 if self.index is None else self.snapshots.sparsities[self.index]

    def observe(self, step: int, sparsity: float, take: Callable[[], object]) -> bool:
        """Call `take()` if the expected sparsity has passed a mark, and return whether it did.

        To be called once a step, after the student's forward pass, and before the optimizer's step, with
        `lambda: snapshots.take(sparsity, gates.paper_masks(), roles.lora())`.
        """
        if not self.collects or self._walk is not None:
            return False
        num_passed = min(math.floor(sparsity / self.spacing + _HAIR), self._num_marks) if sparsity > 0 else 0
        took = num_passed > len(self._passed)
        if took:
            take()
            self._passed += [len(self.snapshots) - 1] * (num_passed - len(self._passed))
        latest = self.warmup_steps + LATEST_WALK * (self.num_steps - self.warmup_steps)
        if sparsity >= self.target or step + 1 >= latest:
            self.reach(step + 1)
        return took

    def reach(self, step: int) -> None:
        """Say that the target is reached before this step, as where a projection has made it so."""
        if self._walk is None:
            self._walk = max(self.num_steps - step, 0), len(self._passed)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        return {"index": self.index, "passed": self._passed, "walk": self._walk, "num_taught": self.num_taught}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the snapshots are loaded before.

        Raises:
            CheckpointError: it speaks of snapshots that are not there.
        """
        wanted = [index for index in (state["index"], *state["passed"]) if index is not None]
        missing = [index for index in wanted if index >= len(self.snapshots)]
        if missing:
            raise CheckpointError(
                f"the schedule of teachers has snapshot {missing[0]}, and {len(self.snapshots)} are there: load those "
                "of the same checkpoint first"
            )
        self.index, self._passed, self.num_taught = state["index"], list(state["passed"]), state["num_taught"]
        self._walk = None if state["walk"] is None else (int(state["walk"][0]), int(state["walk"][1]))

    def _on_the_walk(self, step: int) -> int | None:
        """The paper's teacher: `lag` marks behind, and, once the target is reached, one mark back every few steps."""
        if self._walk is None:
            return self._passed[-self.lag] if len(self._passed) >= self.lag else None
        num_left, num_marks = self._walk
        period = max(num_left // (num_marks + 1), 1)
        mark = min((self.num_steps - step) // period, num_marks + 1) - self.lag
        return self._passed[mark] if mark >= 0 else None

    def _nearest(self, step: int, distances: Callable[[], Distances] | None) -> int | None:
        first, end = self.stage
        rising, step = (1 - self.intact_share) * (end - first), step - first
        if step >= rising:
            return None
        if step % self.interval or not len(self.snapshots):
            return self.index if step else None
        if distances is None:
            raise ValueError("distances=None: 'nearest' goes by what a Probe measures, pass probe.distances")
        found = distances()
        share = self.floor_share + (1 - self.floor_share) * step / rising
        return found.nearest(max(self.floor, share * found.intact))
