"""All that a method decided about one model; the only thing that crosses from training to inference."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
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


@dataclass(repr=False)
class Plan:
    """Decisions about one model: `masks` zero weights.

    `cuts`, `perms` and `side` hold the other kinds of decision. No method makes them yet, so they are empty; they are
    saved and loaded, so that a plan that has them is not taken for one that has not.

    Attributes:
        masks: qualified module name -> `Mask` of its weight, as [out_features, in_features].
        made_by: method, config, base model, data digest, seed, samples, targets, versions.
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

    def __repr__(self) -> str:
        patterns = ", ".join(sorted({str(mask.pattern) for mask in self.masks.values()})) or "nothing"
        notes = "".join(f"\n  • {note}" for note in self.notes)
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
            "notes": self.notes,
            "cuts": self.cuts,
            "perms": self.perms,
            "side": self.side,
        }
        tensors: dict[str, Tensor] = {f"masks.{name}": mask.bits.cpu() for name, mask in self.masks.items()}
        with replace_file(Path(path)) as temporary:
            save_file(tensors, temporary, metadata={"sparsekit_plan": json.dumps(header)})

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
                return cls(masks=masks, made_by=MadeBy(**header["made_by"]), notes=list(header["notes"]), **others)
        except Exception as error:
            raise CheckpointError(f"{path} is not a complete sparsekit plan ({error}): make it again") from error
