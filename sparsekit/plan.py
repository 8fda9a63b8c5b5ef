"""All that a method decided about one model; the only thing that crosses from training to inference."""

import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparsekit_kernels.quant import GRIDS
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.files import replace_file
from sparsekit.masks import Mask


@dataclass
class MadeBy:
    """Where a plan comes from; enough to make it again."""

    method: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    base_model: str = ""
    data_digest: str = ""
    seed: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    updates_weights: bool = False
    """The method also changed kept weights, in the model it ran on; masks alone do not repeat its result."""
    num_samples: int = 0
    """Calibration samples used; 0 where the method needs none."""
    sample_length: int = 0
    """Tokens of the longest of them."""
    targets: list[str] = field(default_factory=list)
    """The entries of `targets` as they were given; a callable by its name."""
    ignore: list[str] = field(default_factory=list)


@dataclass(repr=False, eq=False)
class Plan:
    """Decisions about one model: `masks` zero weights, `scales` say on which grid the others were put.

    `cuts`, `perms` and `side` hold the other kinds of decision. No method makes them yet, so they are empty; they are
    saved and loaded, so that a plan that has them is not taken for one that has not.

    Attributes:
        masks: qualified module name -> `Mask` of its weight, as [out_features, in_features].
        made_by: method, config, base model, data digest, seed, samples, targets, versions.
        scales: module name -> scales of the quantised format that the method rounded to, as that format stores them;
            for `pack_`, which then gives exactly the weights that the method left. Empty where nothing was rounded.
        notes: what a reader of the report must know: layers that fell back, were padded, or were left dense.
        cuts: for later: layers, heads or channels that are kept, by module.
        perms: for later: order of the input features, by module.
        side: for later: low-rank branches beside the sparse weights, by module.
    """

    masks: dict[str, Mask] = field(default_factory=dict)
    made_by: MadeBy = field(default_factory=MadeBy)
    notes: list[str] = field(default_factory=list)
    cuts: dict[str, Any] = field(default_factory=dict)
    perms: dict[str, Any] = field(default_factory=dict)
    side: dict[str, Any] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in _PLAIN)
            and self.scales.keys() == other.scales.keys()
            and all(_same(scales, other.scales[name]) for name, scales in self.scales.items())
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def format(self) -> str | None:
        """Name of the packed format that the plan was made for, None where any will do."""
        return self.made_by.config.get("format")

    def __repr__(self) -> str:
        patterns = ", ".join(sorted({str(mask.pattern) for mask in self.masks.values()})) or "nothing"
        notes = "".join(f"\n  • {note}" for note in self.notes)
        patterns += f" for {self.format}" if self.format else ""
        made = f"{self.made_by.method or 'by hand'}: {patterns}, {len(self.masks)} layers"
        return f"Plan({made}, sparsity={self.sparsity:.3f}){notes}"

    @property
    def sparsity(self) -> float:
        """Share of the planned layers' weights that is removed."""
        total = sum(mask.shape[0] * mask.shape[1] for mask in self.masks.values())
        removed = sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in self.masks.values())
        return removed / max(total, 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, its JSON header holding everything that is not a tensor."""
        header = {
            "masks": {name: {"pattern": str(mask.pattern), "shape": mask.shape} for name, mask in self.masks.items()},
            "made_by": asdict(self.made_by),
            "scales": list(self.scales),
            "notes": self.notes,
            "cuts": self.cuts,
            "perms": self.perms,
            "side": self.side,
        }
        tensors: dict[str, Tensor] = {f"masks.{name}": mask.bits.cpu() for name, mask in self.masks.items()}
        tensors |= {f"scales.{name}": scales.cpu().contiguous() for name, scales in self.scales.items()}
        with replace_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"sparsekit_plan": json.dumps(header)})

    def check_scales(self) -> None:
        """Raise ValueError unless the scales are those of the plan's format for its layers, positive and finite."""
        if not self.scales:
            return
        if self.format not in GRIDS:
            raise ValueError(f"it has scales, and its format is {self.format}, not one of {', '.join(GRIDS)}")
        grid = GRIDS[self.format]
        for name, scales in self.scales.items():
            if name not in self.masks:
                raise ValueError(f"scales of {name}, which has no mask")
            shape = grid.scale_shape(*self.masks[name].shape)
            if scales.shape != shape or scales.dtype != grid.scale_dtype:
                raise ValueError(
                    f"scales of {name} are {scales.dtype} {tuple(scales.shape)}, {self.format} has {grid.scale_dtype} "
                    f"{shape}"
                )
            if not bool(((scales > 0) & scales.isfinite()).all()):
                raise ValueError(f"scales of {name} are not positive and finite")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is truncated or not a plan.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no plan at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["sparsekit_plan"])
                masks = {
                    name: Mask.from_bits(spec["pattern"], file.get_tensor(f"masks.{name}"), tuple(spec["shape"]))
                    for name, spec in header["masks"].items()
                }
                others = {kind: dict(header.get(kind, {})) for kind in ("cuts", "perms", "side")}
                scales = {name: file.get_tensor(f"scales.{name}") for name in header.get("scales", [])}
                plan = cls(masks, MadeBy(**header["made_by"]), list(header["notes"]), **others, scales=scales)
                plan.check_scales()
                return plan
        except Exception as error:
            raise CheckpointError(f"{path} is not a complete sparsekit plan ({error}): make it again") from error


_PLAIN = tuple(field.name for field in fields(Plan) if field.name != "scales")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
