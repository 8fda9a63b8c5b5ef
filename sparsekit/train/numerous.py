"""Numerous teachers in one model (NutePrune, arXiv 2402.09773): the student's own weights, under the masks and the LoRA
that it had when it was less sparse.

`Snapshots` keep masks and LoRA of the way, `Roles` puts them on for a forward pass, and `TeacherSchedule` says which
ones when.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TEACHERS = ("nearest", "paper", "intact", "none")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A student as it was, and a teacher since: what differs from the model that both are.

    Attributes:
        sparsity: expected sparsity when it was taken.
        masks: fp32 on the CPU, as `Masked.masks`.
        lora: name of the parameter -> its value, on the CPU; empty where no LoRA is trained.
    """

    sparsity: float
    masks: dict[str, Tensor]
    lora: dict[str, Tensor]


class Snapshots:
    """Snapshots in the order in which they were taken: in memory, or each a file in a folder.

    Args:
        folder: where the files go; None keeps them in memory, pinned where they come from a GPU.
        dtype: of the LoRA tensors kept: torch.float32, torch.bfloat16 for half the memory, None for that of training.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, dtype: torch.dtype | None = None) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Snapshot:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Snapshot]:
        raise NotImplementedError

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the snapshots take; 0 where they lie on disk."""
        raise NotImplementedError

    def take(self, sparsity: float, masks: Mapping[str, Tensor], lora: Mapping[str, Tensor]) -> Snapshot:
        """Append copies of masks (`Gates.paper_masks()`) and of LoRA (`Roles.lora()`), and return the snapshot."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Tensor]:
        """Return all snapshots as named tensors that safetensors can write, for a checkpoint."""
        raise NotImplementedError

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replace what there is by what `state_dict` gave."""
        raise NotImplementedError


@dataclass(frozen=True)
class Distances:
    """KL(teacher || student) in nats per token, of the intact model and of each snapshot."""

    intact: float
    snapshots: tuple[float, ...]


class TeacherSchedule:
    """Which teacher when.

    Args:
        kind: "paper", "nearest", "intact" (always) or "none" (no teacher at all).
        snapshots: where `observe` puts what it takes.
        target: sparsity that the run is to reach.
        num_steps: steps of the whole run.
        warmup_steps: steps over which the target rises.
        spacing: sparsity from one snapshot to the next.
        lag: of "paper": the student is this many snapshots ahead of its teacher.
        interval: of "nearest": steps from one measurement to the next.
        floor, floor_share, intact_share: of "nearest", see the module's text.
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
        raise NotImplementedError

    @property
    def teaches(self) -> bool:
        """False for "none": there is no teacher to run."""
        raise NotImplementedError

    def teacher(self, step: int, distances: Callable[[], Distances] | None = None) -> Snapshot | None:
        """Return the teacher of a step (from 0), None for the intact model; ask once a step, before its forward passes.

        Args:
            distances: `lambda: probe.distances(snapshots, gates.paper_masks())`; "nearest" calls it where a measurement
                is due, the others never.
        """
        raise NotImplementedError

    @property
    def teacher_sparsity(self) -> float:
        """Sparsity of the teacher that was returned last, 0 for the intact model; for the log."""
        raise NotImplementedError

    def observe(self, step: int, sparsity: float, take: Callable[[], object]) -> bool:
        """Call `take()` if the expected sparsity has passed a mark, and return whether it did.

        To be called once a step, after the student's forward pass, and before the optimizer's step, with
        `lambda: snapshots.take(sparsity, gates.paper_masks(), roles.lora())`.
        """
        raise NotImplementedError

    def reach(self, step: int) -> None:
        """Say that the target is reached from this step on, as when a projection has made it so."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, fit for JSON."""
        raise NotImplementedError

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; the snapshots are loaded before."""
        raise NotImplementedError


class Roles:
    """Lets one model play its teachers, and be the student afterwards as if nothing had been.

    Args:
        model: plain or of peft, without wrappers of a trainer (`accelerator.unwrap_model(model)`).
        masked: the `Masked` of this model.
        adapter: name of the adapter that trains; None where masks alone do.
    """

    def __init__(self, model: nn.Module, masked: Any, adapter: str | None = "default") -> None:
        raise NotImplementedError

    def lora(self) -> dict[str, Tensor]:
        """Return name -> tensor of the student's LoRA as it is now, not copied."""
        raise NotImplementedError

    @contextmanager
    def teacher(self, snapshot: Snapshot | None) -> Iterator[nn.Module]:
        """Play a snapshot, or with None the intact model without adapters: eval mode, no gradient."""
        raise NotImplementedError
        yield

    @contextmanager
    def student(self, masks: Mapping[str, Tensor] | None) -> Iterator[nn.Module]:
        """Play the student under these masks, with its own LoRA: eval mode, no gradient."""
        raise NotImplementedError
        yield


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
        raise NotImplementedError

    def distances(self, snapshots: Snapshots, masks: Mapping[str, Tensor] | None) -> Distances:
        """Return the distance of the student under these masks from the intact model and from each snapshot."""
        raise NotImplementedError
