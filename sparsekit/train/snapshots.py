"""Students as they were on the way, kept to teach (NutePrune, arXiv 2402.09773): masks and LoRA, and of the weights
only those layers that the student had repaired by then; in memory, or each a file."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.files import replace_file


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
        self.clear()
        for snapshot in found:
            self._append(snapshot)

    def clear(self) -> None:
        """Forget all, and delete their files, with the folder and the one around it if nothing else is
        in them."""
        for index in range(len(self) if self.folder is not None else 0):
            self._path(index).unlink(missing_ok=True)
        self._kept, self._read = [], None
        for folder in (self.folder, self.folder.parent) if self.folder is not None else ():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

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
