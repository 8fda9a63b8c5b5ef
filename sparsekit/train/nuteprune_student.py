"""What NutePrune puts on a model to prune it: gates with their constraint, LoRA, masks, and the teachers on the way.

The model's own weights stay as they are all the while, but for those that a one-shot start repairs, and, where hidden
dimensions may go, those on the residual stream, which is turned before the first step; the teachers are turned with it.
A step goes

    begin_step    where a stage begins, take out what a one-shot method would, with its repair; choose the teacher; draw
                  the gates, once for all micro-batches of the step
    (forward and backward passes: the gradients of the masks gather in leaves of their own)
    pull_         average those over processes, take them on to the gates, and add the constraint's; look for marks
    (the optimizer's step)
    end_step      clamp the gates; when their time has come, choose the units that stay, within the budget exactly

so nothing changes between a forward and its backward, and the gates are the same on all processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.budgets import Budget
from sparsekit.methods import METHODS
from sparsekit.snapshot import restored_on_failure
from sparsekit.train.adapters import add_lora, reset_
from sparsekit.train.constraint import AugmentedLagrangian, Constraint, Projected, target_at
from sparsekit.train.gates import Gates, Masks
from sparsekit.train.masked import Masked, leaves_of, pass_gradients_
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_start import calibration_batch_size, one_shot, same_everywhere
from sparsekit.train.roles import Probe, Roles
from sparsekit.train.snapshots import Snapshot, Snapshots
from sparsekit.train.teacher_schedule import TeacherSchedule


@dataclass(frozen=True)
class Member:
    """A model of the family that a run passes on the way: which units are left, and the LoRA that goes with them.

    Attributes:
        sparsity: as it was asked for.
        projected: what is left.
        lora: name of the parameter -> its value, on the CPU: LoRA, and refitted layers.
    """

    sparsity: float
    projected: Projected
    lora: dict[str, Tensor]


class Student:
    """A model with gates and LoRA; it plays its own teachers.

    Args:
        model: dense; on its device.
        args: of the run.
        widths: heads and channels that may go.
        probe: a batch on which distances to teachers are measured.
        length: tokens of a sequence, where the config gives none.
        folder: for snapshots, where they are to lie on disk.
        samples: of the training data, each a batch of one, for one-shot starts.
        turned: directions that the residual stream was turned to, if it was; kept in checkpoints.
        table: the times of a run that is resumed, see `saved_table`; None measures, where the budget is in time.
    Attributes:
        gates: None where nothing is to go; as `constraint` and `lagrangian`.
        adapted: the model with its LoRA, a `PeftModel`.
        projected: what stays, once that is settled.
        members: the sparsities that were kept on the way.
        target, expected: sparsity that the last step aimed at, and that of its gates.
    Raises:
        ValueError: the budget cannot be reached, or the model takes no LoRA.
        Unsupported: the model's parts are not known.
    """

    def __init__(
        self,
        model: nn.Module,
        args: NutePruneConfig,
        *,
        widths: list[Width],
        probe: Mapping[str, Tensor],
        length: float,
        folder: Path | None,
        table: LatencyTable | None = None,
        samples: Sequence[dict[str, Tensor]] = (),
        turned: Tensor | None = None,
    ) -> None:
        self.args, self._widths, self._samples, self._length = args, widths, list(samples), args.length or length
        self.gates: Gates | None = None
        self.constraint: Constraint | None = None
        self.lagrangian: AugmentedLagrangian | None = None
        if args.prunes:
            self.gates = Gates.of(model, args.kinds, widths=widths, stochastic=args.gates == "hard_concrete")
            self.constraint = _constraint(model, self.gates, args, widths, length, table)
            for name in ("keep", "stages"):
                _refuse_unreachable(self.constraint, self.gates, name, getattr(args, name))
            self.lagrangian = self.constraint.lagrangian().to(self.gates.log_alpha.device)
        self.adapted = add_lora(model, args)
        self.masked = Masked(self.adapted, []) if self.gates is None else Masked.of(self.adapted, self.gates)
        self.roles = Roles(self.adapted, self.masked)
        self.snapshots = Snapshots(folder, dtype=torch.bfloat16)
        self.schedule: TeacherSchedule | None = None
        self.teacher: Snapshot | None = None
        self.projected: Projected | None = None
        self.members: list[Member] = []
        self.target = self.expected = 0.0
        self.warmup_steps = self.freeze_step = 0
        self.notes: list[str] = []
        self.turned = turned
        self.num_begun, self.begins_stage = 0, False
        self._stages: list[tuple[int, float | None]] = []
        self._num_steps = 0
        self._probe = Probe(self.roles, probe)
        self._drawn: Masks = {}
        self._leaves: Masks = {}

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return LoRA, gates and multipliers, for an AdamW; the last climb."""
        args = self.args
        lora = [parameter for parameter in self.adapted.parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [{"params": lora, "lr": args.learning_rate, "weight_decay": args.weight_decay}]
        if self.gates is not None and self.lagrangian is not None:
            gates, multipliers = list(self.gates.parameters()), list(self.lagrangian.parameters())
            groups.append({"params": gates, "lr": args.gate_learning_rate, "weight_decay": 0.0})
            groups.append(
                {"params": multipliers, "lr": args.multiplier_learning_rate, "weight_decay": 0.0, "maximize": True}
            )
        return groups

    def plan_steps(self, num_steps: int) -> None:
        """Lay the schedules out over the steps of a run.

        Raises:
            ValueError: the run is too short for them.
        """
        args = self.args
        self._stages, self._num_steps = args.stage_starts(num_steps), num_steps
        self.warmup_steps = round(num_steps * args.sparsity_warmup)
        self.freeze_step = args.freeze_step(num_steps)
        if args.prunes and self.warmup_steps > self.freeze_step:
            raise ValueError(
                f"sparsity_warmup={args.sparsity_warmup:g} of {num_steps} steps ends at {self.warmup_steps}, and gates "
                f"are frozen from {self.freeze_step} on (frozen_share={args.frozen_share:g}): train longer, or lower "
                "one of them"
            )
        target = 0.0 if self.constraint is None else self.constraint.target
        kind = "intact" if target <= 0 and args.teachers != "none" else args.teachers
        self.schedule = TeacherSchedule(
            kind,
            self.snapshots,
            target=target if 0 < target < 1 else 0.5,
            num_steps=num_steps,
            warmup_steps=self.warmup_steps,
            spacing=args.teacher_spacing,
            lag=args.teacher_lag,
            interval=args.teacher_steps,
        )
        if self.num_begun and self._stages:
            self.schedule.stage = self._extent()

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin_step(self, step: int) -> None:
        """Choose the teacher of a step, and draw its gates."""
        assert self.schedule is not None
        self.begins_stage = self.begin_due_stage_(step)
        self.teacher = self.schedule.teacher(step, lambda: self._probe.distances(self.snapshots, self.settled()))
        self.masked.masks = self._masks_of(step)

    def begin_due_stage_(self, step: int) -> bool:
        """Begin a stage if it is due at a step, and return whether it was."""
        is_due = self.num_begun < len(self._stages) and step >= self._stages[self.num_begun][0]
        if is_due:
            self._begin_stage_(step)
        return is_due

    def finish_(self, num_done: int) -> None:
        """Choose what stays, if that is still to be done: training ended early, or with gates that learn."""
        begun, missing = self._stages[: self.num_begun], self._stages[self.num_begun :]
        self._stages = begun + [each for each in missing if each[1] is None or each[1] in self.args.keep]
        if missing:
            self.notes.append("training ended before the last units went: they went without training afterwards")
        while self.num_begun < len(self._stages):
            self._begin_stage_(num_done)
        if self.gates is not None and self.projected is None:
            self.freeze_(num_done)

    def _begin_stage_(self, step: int) -> None:
        """Take out what a one-shot method would, with its repair; and settle that, unless gates are to learn."""
        assert self.gates is not None and self.constraint is not None and self.schedule is not None
        args, sparsity = self.args, self._stages[self.num_begun][1]
        if self.projected is not None:
            self._leave_stage(self._stages[self.num_begun - 1][1])
        self.masked.masks = None
        start = one_shot(
            self.adapted,
            self._widths,
            self.gates.stream,
            None if self.projected is None else self.projected.masks,
            self._method(sparsity),
            self._samples,
            targets=args.targets,
            ignore=args.ignore,
            seed=args.seed,
            batch_size=calibration_batch_size(args),
            progress=not args.disable_tqdm,
            table=self.constraint.table,
        )
        start = same_everywhere(start)
        self._remember_readers()
        self.roles.repair_(start.repaired)
        reset_(self.adapted, start.repaired)
        self.gates.start_from_(start.masks)
        self.projected, self.num_begun = None, self.num_begun + 1
        if self.num_begun < len(self._stages) or self.args.frozen_share == 1 or step >= self.freeze_step:
            masks = {name: torch.ones(size, dtype=torch.bool) for name, size in self.gates.sizes.items()}
            self.projected = self.constraint.as_chosen(masks | start.masks, start.notes)
            self.target = self.expected = self.projected.sparsity
        self.schedule.stage = self._extent()
        if self.num_begun == len(self._stages):
            self.schedule.reach(step)

    def _extent(self) -> tuple[int, int]:
        """Return the first step of the stage that has begun, and the one after its last."""
        starts = [step for step, _ in self._stages] + [self._num_steps]
        return starts[self.num_begun - 1], starts[self.num_begun]

    def _remember_readers(self) -> None:
        """Let who undoes a failed training know what the readers were."""
        plain = self.adapted.get_base_model()
        with restored_on_failure(plain) as snapshot:
            for width in self._widths:
                layer = plain.get_submodule(width.name)
                snapshot.remember(width.name, layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer)

    def _leave_stage(self, sparsity: float | None) -> None:
        """Keep the student as it is at the end of a stage: for the family, and as a teacher of what follows."""
        assert self.projected is not None and self.schedule is not None and sparsity is not None
        if sparsity in self.args.keep:
            self.members.append(Member(sparsity, self.projected, self._lora()))
        if self.schedule.collects:
            masks = {name: mask.float() for name, mask in self.projected.masks.items()}
            self.snapshots.take(self.projected.sparsity, masks, self.roles.lora())

    def _method(self, sparsity: float | None) -> Any:
        args = self.args
        kind: Any = METHODS.get(str(args.start))
        names = ("round_to", "tensor_parallel", "uniform", "min_heads", "min_channels", "batch")
        fields = {name: getattr(args, name) for name in names} | {"length": self._length}
        if "hidden" in kind.__dataclass_fields__:
            fields |= {"hidden": args.hidden, "turn": False}
        budget = {"sparsity": args.sparsity if sparsity is None else sparsity}
        return kind(constraints=budget if args.constraints is None else args.constraints, **fields)

    def _masks_of(self, step: int) -> Masks | None:
        if self.gates is None or self.projected is not None:
            return self.settled()
        generator = torch.Generator().manual_seed((self.args.seed << 32) + step)
        self._drawn = self.gates.sample(generator)
        self._leaves = leaves_of(self._drawn)
        return self._leaves

    def settled(self) -> Masks | None:
        """Return the masks that the model has as it stands, without noise; None where it has none."""
        if self.gates is None:
            return None
        if self.projected is None:
            return self.gates.paper_masks()
        device = self.gates.log_alpha.device
        return {name: mask.to(device) for name, mask in self.projected.masks.items()}

    def pull_(self, step: int) -> None:
        """Take the gradients of the masks on to the gates, with those of the constraint; and look for marks."""
        if self.gates is None or self.constraint is None or self.lagrangian is None or self.projected is not None:
            return
        _average_(self._leaves, self.args.world_size)
        pass_gradients_(self._drawn, self._leaves)
        self._drawn, self._leaves = {}, {}
        self.target = target_at(step, self.warmup_steps, self.constraint.target, self.args.ramp)
        p_open = self.gates.p_open()
        self.lagrangian.penalty(*self.constraint.terms(p_open, self.target)).backward()
        self.expected = float(self.constraint.cost.sparsity(p_open).detach())
        assert self.schedule is not None
        self.schedule.observe(step, self.expected, self._take)
        for sparsity in self._missing_members():
            if self.expected >= sparsity:
                self._keep(sparsity)

    def gate_gradient(self) -> float:
        """Return the norm of the gates' gradient; 0 where there is none."""
        gradient = None if self.gates is None else self.gates.log_alpha.grad
        return 0.0 if gradient is None else float(gradient.norm())

    def end_step(self, num_done: int) -> None:
        """Put gates within their limits; and choose what stays, if it is time."""
        if self.gates is None or self.lagrangian is None or self.projected is not None:
            return
        self.gates.clamp_()
        self.gates.zero_grad()
        self.lagrangian.zero_grad()
        if num_done >= self.freeze_step:
            self.freeze_(num_done)

    def freeze_(self, num_done: int) -> None:
        """Choose the units that stay from now on."""
        assert self.gates is not None and self.constraint is not None and self.schedule is not None
        for sparsity in self._missing_members():
            self._keep(sparsity, f"gates did not get to {sparsity:.0%} on the way: these are the last ones, cut to it")
        self.projected = self.constraint.project(self.gates)
        self.target = self.expected = self.projected.sparsity
        self.schedule.reach(num_done)

    def _take(self) -> None:
        assert self.gates is not None
        self.snapshots.take(self.expected, self.gates.paper_masks(), self.roles.lora())

    def _missing_members(self) -> list[float]:
        kept = {member.sparsity for member in self.members}
        return [sparsity for sparsity in self.args.keep if sparsity not in kept]

    def _keep(self, sparsity: float, *notes: str) -> None:
        assert self.gates is not None and self.constraint is not None
        projected = self.constraint.project(self.gates, sparsity=sparsity)
        projected = replace(projected, notes=[*projected.notes, *notes])
        self.members.append(Member(sparsity, projected, self._lora()))

    def intact(self) -> dict[str, Tensor]:
        """Return what the dense model has where the student has its own, by names of the plain model; on the CPU."""
        own = {name.removeprefix("base_model.model."): x for name, x in self.roles.intact().items()}
        return {name.replace(".base_layer.", "."): x.to("cpu", copy=True) for name, x in own.items()}

    def _lora(self) -> dict[str, Tensor]:
        return {name: value.to("cpu", copy=True) for name, value in self.roles.lora().items()}

    def last_member(self) -> Member:
        """Return what the run ends with."""
        assert self.projected is not None
        return Member(self.projected.sparsity, self.projected, self._lora())

    def log(self) -> dict[str, float]:
        """Return the numbers of the last step, for the log."""
        assert self.schedule is not None
        found = {"teacher_sparsity": self.schedule.teacher_sparsity} if self.schedule.teaches else {}
        if self.gates is None or self.constraint is None or self.lagrangian is None:
            return found
        settled = self.settled()
        assert settled is not None
        with torch.no_grad():
            linear, square = (float(each.mean()) for each in self.lagrangian.multipliers)
        real = 1 - self.constraint.cost.of_masks(settled) / self.constraint.cost.dense
        found |= {"target_sparsity": self.target, "expected_sparsity": self.expected, "real_sparsity": real}
        return found | {"multiplier_linear": linear, "multiplier_square": square}

    # --- what a checkpoint holds -----------------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return all that a resumed run needs beside the optimizer's state, by name."""
        state = {f"lora.{name}": value for name, value in self.roles.lora().items()}
        for prefix, module in (("gates", self.gates), ("lagrangian", self.lagrangian)):
            state |= {} if module is None else {f"{prefix}.{name}": x for name, x in module.state_dict().items()}
        state |= {} if self.turned is None else {"turned": self.turned}
        state |= {f"snapshots.{name}": value for name, value in self.snapshots.state_dict().items()}
        if self.projected is not None:
            state |= {f"projected.{name}": mask for name, mask in self.projected.masks.items()}
        for index, member in enumerate(self.members):
            state |= {f"member.{index}.masks.{name}": mask for name, mask in member.projected.masks.items()}
            state |= {f"member.{index}.lora.{name}": value for name, value in member.lora.items()}
        return {name: value.detach().to("cpu").contiguous() for name, value in state.items()}

    def numbers(self) -> dict[str, Any]:
        """Return the rest of it, fit for JSON."""
        table = None if self.constraint is None else self.constraint.table
        return {
            "schedule": None if self.schedule is None else self.schedule.state_dict(),
            "table": None if table is None else asdict(table),
            "projected": None if self.projected is None else _numbers(self.projected),
            "members": [{"sparsity": each.sparsity, **_numbers(each.projected, "real")} for each in self.members],
            "sparsities": [self.target, self.expected],
            "stages_begun": self.num_begun,
            "notes": self.notes,
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Go on from what `tensors` and `numbers` gave; the schedule is loaded apart, once it is made."""
        lora = _under("lora", tensors)
        self._remember_readers()
        self.roles.load(lora)
        if self.gates is not None and self.lagrangian is not None:
            self.gates.load_state_dict(_under("gates", tensors))
            self.lagrangian.load_state_dict(_under("lagrangian", tensors))
        self.snapshots.load(_under("snapshots", tensors))
        if numbers["projected"] is not None:
            self.projected = _projected(_under("projected", tensors), numbers["projected"])
        for index, each in enumerate(numbers["members"]):
            masks, lora = (_under(f"member.{index}.{part}", tensors) for part in ("masks", "lora"))
            self.members.append(Member(each["sparsity"], _projected(masks, each, "real"), lora))
        self.target, self.expected = numbers["sparsities"]
        self.num_begun, self.notes = numbers["stages_begun"], list(numbers["notes"])


def saved_table(numbers: Mapping[str, Any]) -> LatencyTable | None:
    """Return the times that a run went by, of what `Student.numbers` gave; None where its budget is not in time."""
    if (saved := numbers["table"]) is None:
        return None
    points = {name: tuple((number, time) for number, time in each) for name, each in saved["points"].items()}
    return LatencyTable(**{**saved, "points": points, "notes": tuple(saved["notes"])})


def _constraint(
    model: nn.Module,
    gates: Gates,
    args: NutePruneConfig,
    widths: list[Width],
    length: float,
    table: LatencyTable | None,
) -> Constraint:
    """Return the constraint of a run; where times are measured, all processes go by those of the first."""
    names = ("round_to", "tensor_parallel", "uniform", "min_heads", "min_channels", "batch")
    given: dict[str, Any] = {name: getattr(args, name) for name in names}
    given |= {"widths": widths, "length": args.length or length}
    given["gates_learn"] = not args.is_one_shot or args.frozen_share < 1
    is_shared = args.world_size > 1 and table is None and Budget.parse(args.budget).measure == "ns"
    constraint = None
    if not is_shared or args.process_index == 0:
        constraint = Constraint.of(model, gates, args.budget, **given, table=table)
    if is_shared:
        found = [None if constraint is None else constraint.table]
        torch.distributed.broadcast_object_list(found, src=0, device=args.device)
        constraint = constraint or Constraint.of(model, gates, args.budget, **given, table=found[0])
    assert constraint is not None
    return constraint


def _refuse_unreachable(constraint: Constraint, gates: Gates, name: str, sparsities: list[float]) -> None:
    """Raise ValueError, now and not on the way, where legal numbers of units miss what is to be kept."""
    for sparsity in sparsities:
        try:
            constraint.project(gates, sparsity=sparsity)
        except ValueError as error:
            raise ValueError(f"{name}={sparsities}: {error}") from None


def _average_(leaves: Masks, num_processes: int) -> None:
    """Average the gradients of leaves over processes."""
    if num_processes < 2:
        return
    gradients = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves.values()]
    together = torch.cat(gradients)
    torch.distributed.all_reduce(together)
    together /= num_processes
    for leaf, gradient in zip(leaves.values(), together.split([len(each) for each in gradients]), strict=True):
        leaf.grad = gradient


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{prefix}."): x for name, x in tensors.items() if name.startswith(f"{prefix}.")}


def _numbers(projected: Projected, sparsity: str = "sparsity") -> dict[str, Any]:
    return {"cost": projected.cost, sparsity: projected.sparsity, "notes": projected.notes}


def _projected(masks: Masks, numbers: Mapping[str, Any], sparsity: str = "sparsity") -> Projected:
    return Projected(masks, numbers["cost"], numbers[sparsity], list(numbers["notes"]))
