"""Numerous teachers in one model (NutePrune, arXiv 2402.09773): the student's own weights, under the masks and the LoRA
that it had when it was less sparse.

`Snapshots` keep masks and LoRA of the way, `Roles` puts them on for a forward pass, and `TeacherSchedule` says which
ones when. A teacher costs its masks and LoRA in memory, and of the weights only those layers that the student had
repaired by then; of all others there is one copy.

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

import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from sparsekit.errors import CheckpointError, Unsupported
from sparsekit.files import replace_file
from sparsekit.registry import unknown
from sparsekit.train.adapters import ADAPTER, adapter_layers, lora_parameters
from sparsekit.train.distill import TopK, distillation_loss
from sparsekit.train.trainer import from_first_rank

TEACHERS = ("nearest", "paper", "intact", "none")

LATEST_WALK = 0.75
"""Share of the steps after the warm-up at which the paper's teacher walks back, though the target be not reached."""

_HAIR = 1e-6
"""In units of the spacing: what rounding may make of a mark."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A student as it was, and a teacher since: what differs from the model that both are.

    Attributes:
        sparsity: expected sparsity when it was taken.
        masks: fp32 on the CPU, as `Masked.masks`.
        lora: name of the parameter -> its value, on the CPU: LoRA, and layers that the student had of its own; empty
            where there are none.
    """

    sparsity: float
    masks: dict[str, Tensor]
    lora: dict[str, Tensor]


class Snapshots:
    """Snapshots in the order in which they were taken: in memory, or each a file in a folder.

    Args:
        folder: where the files go; None keeps them in memory, pinned where they come from a GPU.
        dtype: of the LoRA tensors kept: torch.float32, torch.bfloat16 for half the memory, None for that of training.
            In bf16 a teacher is what the student was only up to that rounding.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.float32, torch.bfloat16):
            raise ValueError(f"dtype={dtype}: keep snapshots in torch.float32 or torch.bfloat16")
        self.folder = None if folder is None else Path(folder)
        self.dtype = dtype
        self._kept: list[Snapshot | float] = []  # on disk: the sparsity
        self._read: tuple[int, Snapshot] | None = None

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Snapshot:
        """Return a snapshot; the same object again, where it is asked for twice in a row."""
        if not 0 <= index < len(self._kept):
            raise IndexError(f"snapshot {index} of {len(self._kept)}")
        kept = self._kept[index]
        if isinstance(kept, Snapshot):
            return kept
        if self._read is None or self._read[0] != index:
            self._read = index, _read_snapshot(self._path(index), kept)
        return self._read[1]

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[index] for index in range(len(self)))

    @property
    def sparsities(self) -> list[float]:
        """Expected sparsity of each."""
        return [kept.sparsity if isinstance(kept, Snapshot) else kept for kept in self._kept]

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the snapshots take; 0 where they lie on disk."""
        inside = [kept for kept in self._kept if isinstance(kept, Snapshot)]
        return sum(x.nbytes for kept in inside for x in (*kept.masks.values(), *kept.lora.values()))

    def take(self, sparsity: float, masks: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> Snapshot:
        """Append copies of masks (`Gates.paper_masks()`) and of LoRA (`Roles.lora()`), and return the snapshot."""
        pin = self.folder is None and any(x.is_cuda for x in (*masks.values(), *lora.values()))
        snapshot = Snapshot(
            float(sparsity),
            {name: _copy(x, torch.float32, pin) for name, x in masks.items()},
            {name: _copy(x, self.dtype or x.dtype, pin) for name, x in lora.items()},
        )
        self._append(snapshot)
        return snapshot

    def state_dict(self) -> dict[str, Tensor]:
        """Return all snapshots as named tensors that safetensors can write, for a checkpoint."""
        state = {"sparsity": torch.tensor(self.sparsities, dtype=torch.float64)}
        for index, snapshot in enumerate(self):
            state |= {f"{index}.{name}": x for name, x in _tensors(snapshot).items()}
        return state

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace what there is by what `state_dict` gave.

        Raises:
            CheckpointError: it is no such thing. Nothing was changed.
        """
        parts: dict[int, dict[str, Tensor]] = {}
        try:
            sparsities = state["sparsity"].tolist()
            for key in state.keys() - {"sparsity"}:
                index, _, name = key.partition(".")
                parts.setdefault(int(index), {})[name] = state[key]
            if parts.keys() - set(range(len(sparsities))):
                raise ValueError(f"{len(sparsities)} sparsities, and tensors of snapshot {max(parts)}")
            pin = self.folder is None and torch.cuda.is_initialized()
            found = [_snapshot(sparsity, parts.get(i, {}), pin) for i, sparsity in enumerate(sparsities)]
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"these are no snapshots of teachers ({error}): resume from another") from error
        self._kept, self._read = [], None
        for snapshot in found:
            self._append(snapshot)

    def _append(self, snapshot: Snapshot) -> None:
        if self.folder is None:
            self._kept.append(snapshot)
            return
        with replace_file(self._path(len(self))) as temporary:
            save_file(_tensors(snapshot), temporary)
        self._kept.append(snapshot.sparsity)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"snapshot-{index:04d}.safetensors"


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
        self.stage = 0, num_steps
        self._passed: list[int] = []  # mark -> its snapshot
        self._walk: tuple[int, int] | None = None  # steps and marks when the walk back began
        self._num_marks = max(math.ceil(target / spacing - _HAIR) - 1, 0)  # all below the target
        if kind == "paper" and self._num_marks + 1 < lag:
            warnings.warn(
                f"the target of {target:.1%} is less than {lag} marks of {spacing:.1%} away: the intact model teaches "
                "throughout. Lower the lag or the spacing, or use 'nearest'",
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
        return {"index": self.index, "passed": self._passed, "walk": self._walk}

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
        self.index, self._passed = state["index"], list(state["passed"])
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


class Roles:
    """Lets one model play its teachers, and be the student afterwards as if nothing had been.

    The student's LoRA is not written to: while another plays, the parameters are given other memory, kept for that. So
    two sets of LoRA are on the device, whatever the number of teachers; and of layers that the student has repaired
    (see `repair_`) its own, the intact ones, and where snapshots teach those of one snapshot.

    Args:
        model: plain or of peft, without wrappers of a trainer (`accelerator.unwrap_model(model)`).
        masked: the `Masked` of this model.
        adapter: name of the adapter that trains; None where masks alone do.
    Raises:
        ValueError: the model has no such adapter.
        Unsupported: its LoRA is sharded.
    """

    def __init__(self, model: nn.Module, masked: Any, adapter: str | None = ADAPTER) -> None:
        self.model, self.masked = model, masked
        self._lora = {} if adapter is None else lora_parameters(model, adapter)
        if any(isinstance(parameter, DTensor) for parameter in self._lora.values()):
            raise Unsupported("the LoRA is sharded over processes: train with DDP, it is small")
        self._intact: dict[str, Tensor] = {}
        self._others: dict[str, Tensor] = {}
        self._worn: Snapshot | None = None
        self._is_playing = False

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def lora(self) -> dict[str, Tensor]:
        """Return name -> tensor of the student's LoRA as it is now, not copied; and of its repaired layers."""
        return {name: parameter.detach() for name, parameter in self._lora.items()}

    def intact(self) -> dict[str, Tensor]:
        """Return name of a repaired parameter -> what it is in the intact model."""
        return dict(self._intact)

    def repair_(self, repaired: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Give the student layers of its own; the intact model keeps what it has, and snapshots theirs.

        Args:
            repaired: name of a layer in the plain model -> its parameters by name. The same layers each time.
        """
        plain: Any = getattr(self.model, "get_base_model", lambda: self.model)()
        names = {id(parameter): name for name, parameter in self.model.named_parameters(remove_duplicate=False)}
        found: dict[str, Tensor] = {}
        for layer, parameters in repaired.items():
            module = plain.get_submodule(layer)
            own = module.get_base_layer() if hasattr(module, "get_base_layer") else module
            found |= {names[id(own.get_parameter(key))]: value for key, value in parameters.items()}
        self.load(found)

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Give the student what `lora` gave, or part of it; a parameter that is no LoRA's becomes its own."""
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, value in values.items():
            if name not in self._lora:
                self._lora[name] = parameters[name]
                self._intact[name] = parameters[name].data
                parameters[name].data = torch.empty_like(parameters[name].data)
            self._lora[name].data.copy_(value)
        torch.clear_autocast_cache()

    @contextmanager
    def teacher(self, snapshot: Snapshot | None) -> Iterator[nn.Module]:
        """Play a snapshot, or with None the intact model without adapters: eval mode, no gradient.

        Afterwards weights, gradients wanted, modes, masks and random numbers are as before, also where the body fails.

        Raises:
            ValueError: the snapshot is of another model.
        """
        if snapshot is None:
            with self._playing(None), self._without_adapters(), self._with(self._intact):
                yield self.model
            return
        if snapshot.lora.keys() != self._lora.keys():
            odd = sorted(snapshot.lora.keys() ^ self._lora.keys())[0]
            raise ValueError(f"the snapshot has another LoRA than the model, see {odd}: play one of this model")
        masks = {name: mask.to(self.device) for name, mask in snapshot.masks.items()}
        with self._playing(masks), self._wearing(snapshot):
            yield self.model

    @contextmanager
    def student(self, masks: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Play the student under these masks, with its own LoRA: eval mode, no gradient."""
        with self._playing(masks):
            yield self.model

    @contextmanager
    def _playing(self, masks: Mapping[str, Tensor] | None) -> Iterator[None]:
        if self._is_playing:
            raise RuntimeError("the model plays a role already: leave that one first")
        own, modes = self.masked.masks, [(module, module.training) for module in self.model.modules()]
        with _same_random_numbers(self.model), torch.no_grad():
            self._is_playing = True
            try:
                for module, _ in modes:
                    module.training = False
                self.masked.masks = masks
                yield
            finally:
                self.masked.masks = own
                for module, training in modes:
                    module.training = training
                self._is_playing = False

    @contextmanager
    def _wearing(self, snapshot: Snapshot) -> Iterator[None]:
        """Give the parameters of the LoRA the memory in which the snapshot's is."""
        if snapshot is not self._worn:
            self._worn = None
            for name, parameter in self._lora.items():
                if name not in self._others or self._others[name].device != parameter.device:
                    self._others[name] = torch.empty_like(parameter.detach())
                self._others[name].copy_(snapshot.lora[name], non_blocking=True)
            self._worn = snapshot
        with self._with(self._others):
            yield

    @contextmanager
    def _with(self, others: Mapping[str, Tensor]) -> Iterator[None]:
        """Give parameters this memory for a while."""
        own = {name: self._lora[name].data for name in others}
        try:
            for name, other in others.items():
                self._lora[name].data = other
            torch.clear_autocast_cache()  # which knows a weight by its parameter
            yield
        finally:
            for name, x in own.items():
                self._lora[name].data = x
            torch.clear_autocast_cache()

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Switch adapters off; peft, which does so by the gradients that they want, is not let have its way there."""
        layers = [layer for layer in adapter_layers(self.model) if not layer.disable_adapters]
        wanted = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
        try:
            for layer in layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)


class Probe:
    """Measures how far a student is from its teachers, on a few held tokens.

    A teacher never changes, so each says what it has to say once; from then on a measurement is one forward pass of
    the student, however many teachers there are.

    Args:
        roles: of the model.
        inputs: a batch as the model takes it, without labels; the same on all ranks.
        top_k: tokens of a teacher's distribution that are kept for each place, the others as one.
    """

    def __init__(self, roles: Roles, inputs: Mapping[str, Tensor], top_k: int = 64) -> None:
        self.roles, self.top_k = roles, top_k
        self.inputs = {key: value.to(roles.device) for key, value in inputs.items() if key != "labels"}
        get_base = getattr(roles.model, "get_base_model", None)
        base: nn.Module = get_base() if callable(get_base) else roles.model
        self._options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
        self._intact: TopK | None = None
        self._said: dict[int, tuple[float, TopK]] = {}

    def distances(self, snapshots: Snapshots, masks: Mapping[str, Tensor] | None) -> Distances:
        """Return the distance of the student under these masks from the intact model and from each snapshot."""
        if self._intact is None:
            with self.roles.teacher(None) as model:
                self._intact = self._likeliest(model)
        for index, sparsity in enumerate(snapshots.sparsities):
            if index not in self._said or self._said[index][0] != sparsity:
                with self.roles.teacher(snapshots[index]) as model:
                    self._said[index] = sparsity, self._likeliest(model)
        with self.roles.student(masks) as model:
            logits = self._logits(model)
            heard = [self._intact, *(self._said[index][1] for index in range(len(snapshots)))]
            found = torch.stack([self._distance(logits, said) for said in heard])
        intact, *others = from_first_rank(found.double()).tolist()  # all ranks must choose alike
        return Distances(intact, tuple(others))

    def _logits(self, model: nn.Module) -> Tensor:
        """Return logits [tokens, V]; places of padding are left out."""
        logits: Tensor = model(**self.inputs, **self._options).logits
        seen = self.inputs.get("attention_mask")
        return logits.flatten(0, -2) if seen is None else logits[seen.bool()]

    def _likeliest(self, model: nn.Module) -> TopK:
        log_probs = torch.log_softmax(self._logits(model).float(), -1)
        found = log_probs.topk(min(self.top_k, log_probs.shape[-1]))
        return TopK(found.indices.int().cpu(), found.values.cpu())

    @staticmethod
    def _distance(logits: Tensor, said: TopK) -> Tensor:
        labels = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)  # no matter: ce_weight is 0
        teacher = TopK(said.ids.to(logits.device), said.log_probs.to(logits.device))
        return distillation_loss(logits, teacher, labels, kd_weight=1, ce_weight=0, temperature=1).kd


@contextmanager
def _same_random_numbers(model: nn.Module) -> Iterator[None]:
    """Leave the generators of torch, on the CPU and where the model is, as they are."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type not in ("cpu", "meta")}
    kinds = {device.type for device in devices} or {"cuda"}
    assert len(kinds) == 1, f"one model on {kinds}"
    with torch.random.fork_rng([device.index for device in devices], device_type=kinds.pop()):
        yield


def _copy(x: Tensor, dtype: torch.dtype, pin: bool) -> Tensor:
    copied = torch.empty(x.shape, dtype=dtype, pin_memory=pin)
    return copied.copy_(x.detach())


def _tensors(snapshot: Snapshot) -> dict[str, Tensor]:
    masks = {f"masks.{name}": mask for name, mask in snapshot.masks.items()}
    return masks | {f"lora.{name}": x for name, x in snapshot.lora.items()}


def _snapshot(sparsity: float, tensors: Mapping[str, Tensor], pin: bool = False) -> Snapshot:
    if not pin:
        own = dict(tensors)
    else:
        own = {name: _copy(x, x.dtype, pin) for name, x in tensors.items()}
    masks = {name.removeprefix("masks."): x for name, x in own.items() if name.startswith("masks.")}
    lora = {name.removeprefix("lora."): x for name, x in own.items() if name.startswith("lora.")}
    if not masks or len(masks) + len(lora) != len(own):
        raise ValueError(f"the snapshot at {sparsity:.1%} has {', '.join(sorted(own)[:3]) or 'nothing'}")
    return Snapshot(sparsity, masks, lora)


def _read_snapshot(path: Path, sparsity: float) -> Snapshot:
    try:
        with safe_open(path, framework="pt") as file:
            return _snapshot(sparsity, {name: file.get_tensor(name) for name in file.keys()})
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}): a teacher of this run is lost, resume from a checkpoint"
        ) from error
