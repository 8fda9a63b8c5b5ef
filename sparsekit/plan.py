"""All that a method decided about one model; the only thing that crosses from training to inference."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparsekit_kernels.layout24 import padded_features
from sparsekit_kernels.quant import GRIDS
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.files import replace_file
from sparsekit.masks import Mask
from sparsekit.registry import unknown


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


@dataclass(frozen=True, eq=False)
class SideBranch:
    """A low-rank branch beside a sparse weight: y = x @ (W*m).T + z @ S.T with z = x @ X.T (SLoRB, arXiv 2407.20584).

    Attributes:
        S: floating [N, r].
        X: floating [r, K]; None for the frozen block indicator, whose z are the sums of `group` consecutive features
            of x each, so that it costs neither storage nor a product.
        group: features in one sum. Without X, r = ceil(K / group), and the last group may be shorter. With X it only
            names the budget that r was chosen for, or the indicator that X started from.
    Raises:
        ValueError: a shape or a dtype does not fit the others, or `group` is not positive.
    """

    S: Tensor
    X: Tensor | None = None
    group: int = 16

    def __post_init__(self) -> None:
        if self.group < 1:
            raise ValueError(f"group={self.group} is no number of features: use 1 or more, as 16")
        for name, factor in (("S", self.S), ("X", self.X)):
            if factor is not None and (factor.dim() != 2 or not factor.is_floating_point()):
                raise ValueError(f"{name} must be a floating matrix, got {factor.dtype} of shape {tuple(factor.shape)}")
        if self.X is not None and self.X.shape[0] != self.S.shape[1]:
            raise ValueError(f"S is {tuple(self.S.shape)} and X is {tuple(self.X.shape)}: give S [N, r] and X [r, K]")

    @property
    def rank(self) -> int:
        """Columns of S."""
        return self.S.shape[1]

    @property
    def num_numbers(self) -> int:
        """How many numbers the branch stores; a frozen X is none."""
        return self.S.numel() + (0 if self.X is None else self.X.numel())

    def why_not(self, N: int, K: int) -> str | None:
        """Return why this cannot be the branch of a weight [N, K], or None if it can."""
        if self.S.shape[0] != N:
            return f"its S has {self.S.shape[0]} rows, the weight has {N}"
        if self.X is not None:
            return None if self.X.shape[1] == K else f"its X has {self.X.shape[1]} columns, the weight has {K}"
        rank = -(-K // self.group)
        return None if self.rank == rank else f"its S has {self.rank} columns, {K} features make {rank} groups"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SideBranch):
            return NotImplemented
        if self.group != other.group or not _same(self.S, other.S):
            return False
        if self.X is None or other.X is None:
            return self.X is other.X
        return _same(self.X, other.X)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class InputOrder:
    """The order that a layer's inputs were put into, and how to tell whether a model has it yet.

    Attributes:
        order: int64 [K], the input feature that came to each place.
        signature: fp32 [K], of the columns in their old order, see `signature_of`.
    """

    order: Tensor
    signature: Tensor

    def __post_init__(self) -> None:
        K = self.order.numel()
        if self.order.dtype != torch.int64 or not torch.equal(self.order.sort().values.cpu(), torch.arange(K)):
            raise ValueError("order must hold each of 0 … K-1 once, as int64 [K]")
        if self.signature.shape != (K,) or self.signature.dtype != torch.float32 or not self.signature.isfinite().all():
            raise ValueError(f"signature must be fp32 [{K}] and finite, got {self.signature.dtype}")

    @staticmethod
    def signature_of(w_NK: Tensor) -> Tensor:
        """Return the alternating sum of each column, w_0k - w_1k + w_2k …, fp32 [K] on the CPU."""
        return (w_NK[0::2].float().sum(dim=0) - w_NK[1::2].float().sum(dim=0)).cpu()

    def is_in(self, w_NK: Tensor) -> bool:
        """Return whether the columns have this order already.

        Columns are known by their signatures: those that were moved are more like the ones that the order brought
        there than like the ones that were there before, though half of their weights be gone and the rest trained on.
        """
        order = self.order.cpu()
        moved = order != torch.arange(len(order))
        now, old, new = self.signature_of(w_NK)[moved], self.signature[moved], self.signature[order][moved]
        return bool(now @ new > now @ old)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, InputOrder):
            return NotImplemented
        return _same(self.order, other.order) and _same(self.signature, other.signature)

    __hash__ = None  # type: ignore[assignment]


CUT_KINDS = ("heads", "channels", "hidden", "layers")


@dataclass(frozen=True, eq=False)
class Cut:
    """Which units of one kind, in one place, are left; the others go with all that they are made of.

    Attributes:
        kept: int64 [n], ascending; at least one.
        num: how many units there were.
        kind: "heads" (under grouped queries a key-value head with all its queries), "channels", "layers", or "hidden",
            the dimensions of the residual stream.
    Raises:
        ValueError: the kind is unknown, or `kept` is no such list: a part of which nothing is left cannot be had.
    """

    kept: Tensor
    num: int
    kind: str

    def __post_init__(self) -> None:
        if self.kind not in CUT_KINDS:
            raise ValueError(unknown("kind", self.kind, list(CUT_KINDS)))
        if self.kept.dim() != 1 or self.kept.dtype != torch.int64:
            raise ValueError(f"kept must be int64 [n], got {self.kept.dtype} of shape {tuple(self.kept.shape)}")
        if not len(self.kept):
            raise ValueError(f"nothing is left of {self.num} {self.kind}: keep 1 or more")
        rising = bool((self.kept.diff() > 0).all())
        if not rising or self.kept[0] < 0 or self.kept[-1] >= self.num:
            raise ValueError(f"kept must rise from 0 or more to {self.num - 1} or less, got {_few(self.kept)}")

    @property
    def removed(self) -> Tensor:
        """The units that go, int64 [num - n], ascending."""
        stays = torch.zeros(self.num, dtype=torch.bool).index_fill(0, self.kept.cpu(), True)
        return (~stays).nonzero().flatten()

    def __repr__(self) -> str:
        return f"Cut({self.kind}: {len(self.kept):,} of {self.num:,})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Cut):
            return NotImplemented
        return (self.num, self.kind) == (other.num, other.kind) and _same(self.kept, other.kept)

    __hash__ = None  # type: ignore[assignment]


@dataclass(repr=False, eq=False)
class Plan:
    """Decisions about one model: `masks` zero weights, `scales` say on which grid the others were put, `side` what runs
    beside them.

    `cuts` come first: they make the model smaller, and all else refers to what they leave. Layers go before heads and
    channels, so that every name is one in the model as it is without the layers that went. `perms` come next, and say
    in which order the inputs of some layers are put.

    Attributes:
        masks: qualified module name -> `Mask` of its weight, as [out_features, in_features].
        made_by: method, config, base model, data digest, seed, samples, targets, versions.
        scales: module name -> scales of the quantised format that the method rounded to, as that format stores them;
            for `pack_`, which then gives exactly the weights that the method left. Empty where nothing was rounded.
        notes: what a reader of the report must know: layers that fell back, were padded, or were left dense.
        cuts: what is left of a model's parts. The key of heads and channels is the layer that reads them (`name` of
            `sparsekit.archs.Width`), that of layers their list, as "model.layers", that of hidden dimensions the input
            embedding.
        perms: module name -> order of its input features, which masks and scales refer to.
        side: module name -> low-rank branch beside its sparse weight; each module has a mask, too.
        sensitivity: key of `cuts` -> how much the model's answers suffer where this part alone keeps 0, 1, … of its
            units, float64 [num + 1]; of methods that measure it. Nothing is applied from it.
    """

    masks: dict[str, Mask] = field(default_factory=dict)
    made_by: MadeBy = field(default_factory=MadeBy)
    notes: list[str] = field(default_factory=list)
    cuts: dict[str, Cut] = field(default_factory=dict)
    perms: dict[str, InputOrder] = field(default_factory=dict)
    side: dict[str, SideBranch] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return (
            all(getattr(self, name) == getattr(other, name) for name in _PLAIN)
            and _all_same(self.scales, other.scales)
            and _all_same(self.sensitivity, other.sensitivity)
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
        made = f"{self.made_by.method or 'by hand'}: "
        made += ", ".join(f"{num:,} of {total:,} {kind}" for kind, (num, total) in self.units().items())
        made += ", then " if self.cuts and self.masks else ""
        made += f"{patterns}, {len(self.masks)} layers" if self.masks or not self.cuts else ""
        made += f", {len(self.side)} with a side branch" if self.side else ""
        made += f", {len(self.perms)} with reordered inputs" if self.perms else ""
        return f"Plan({made}, sparsity={self.sparsity:.3f}){notes}"

    def units(self) -> dict[str, tuple[int, int]]:
        """Return, for each kind of cut, how many units are left and how many there were, where any go."""
        found: dict[str, tuple[int, int]] = {}
        for kind in CUT_KINDS:
            cuts = [cut for cut in self.cuts.values() if cut.kind == kind]
            if cuts:
                found[kind] = sum(len(cut.kept) for cut in cuts), sum(cut.num for cut in cuts)
        return found

    @property
    def sparsity(self) -> float:
        """Share of the masked layers' weights that is removed, less the numbers that side branches add.

        Of a plan that only cuts, the share of the units that go, each cut counting as much as another. What weights a
        unit has, the plan does not say; `check` counts them.
        """
        if self.cuts and not self.masks:
            return sum(1 - len(cut.kept) / cut.num for cut in self.cuts.values()) / len(self.cuts)
        total = sum(mask.shape[0] * mask.shape[1] for mask in self.masks.values())
        removed = sum(mask.sparsity * mask.shape[0] * mask.shape[1] for mask in self.masks.values())
        return (removed - sum(branch.num_numbers for branch in self.side.values())) / max(total, 1)

    def digest(self) -> str:
        """Return a hash of the masks, and of the orders of inputs that they refer to."""
        digest = hashlib.sha256()
        for name in sorted(self.masks):
            mask, order = self.masks[name], self.perms.get(name)
            digest.update(f"{name} {mask.pattern} {mask.shape}".encode())
            digest.update(mask.bits.cpu().numpy().tobytes())
            digest.update(b"" if order is None else order.order.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, its JSON header holding everything that is not a tensor."""
        header = {
            "masks": {name: {"pattern": str(mask.pattern), "shape": mask.shape} for name, mask in self.masks.items()},
            "made_by": asdict(self.made_by),
            "scales": list(self.scales),
            "notes": self.notes,
            "cuts": {name: {"kind": cut.kind, "num": cut.num} for name, cut in self.cuts.items()},
            "perms": list(self.perms),
            "sensitivity": list(self.sensitivity),
            "side": {name: {"group": branch.group, "X": branch.X is not None} for name, branch in self.side.items()},
        }
        tensors: dict[str, Tensor] = {f"masks.{name}": mask.bits.cpu() for name, mask in self.masks.items()}
        tensors |= {f"scales.{name}": scales.cpu().contiguous() for name, scales in self.scales.items()}
        tensors |= {f"cuts.{name}": cut.kept.cpu().contiguous() for name, cut in self.cuts.items()}
        tensors |= {f"sensitivity.{name}": curve.cpu().contiguous() for name, curve in self.sensitivity.items()}
        for name, perm in self.perms.items():
            tensors[f"perms.{name}.order"] = perm.order.cpu().contiguous()
            tensors[f"perms.{name}.signature"] = perm.signature.cpu().contiguous()
        for name, branch in self.side.items():
            tensors[f"side.{name}.S"] = branch.S.detach().cpu().contiguous()
            if branch.X is not None:
                tensors[f"side.{name}.X"] = branch.X.detach().cpu().contiguous()
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
            N, K = self.masks[name].shape
            shape = grid.scale_shape(N, K)
            shapes = [shape]
            if name in self.side:  # whose columns lie behind those of the weight, and may have scales, too
                shapes.append(grid.scale_shape(N, padded_features(K) + padded_features(2 * self.side[name].rank)))
            if scales.shape not in shapes or scales.dtype != grid.scale_dtype:
                raise ValueError(
                    f"scales of {name} are {scales.dtype} {tuple(scales.shape)}, {self.format} has {grid.scale_dtype} "
                    f"{shape}"
                )
            if not bool(((scales > 0) & scales.isfinite()).all()):
                raise ValueError(f"scales of {name} are not positive and finite")

    def check_cuts(self) -> None:
        """Raise ValueError where something refers to a layer that the cuts leave no place for."""
        lists = {name: len(cut.kept) for name, cut in self.cuts.items() if cut.kind == "layers"}
        for name in (*self.cuts, *self.masks):
            for blocks, num in lists.items():
                place = name.removeprefix(f"{blocks}.").partition(".")[0] if name.startswith(f"{blocks}.") else ""
                if place.isdigit() and int(place) >= num:
                    raise ValueError(
                        f"the plan speaks of {name}, and leaves {num} layers in {blocks}: names are those of the "
                        f"model without the layers that went, {blocks}.0 to {blocks}.{num - 1}"
                    )

    def check_perms(self) -> None:
        """Raise ValueError unless every order of inputs fits the mask of its layer."""
        for name, perm in self.perms.items():
            if name not in self.masks:
                raise ValueError(f"an order of the inputs of {name}, which has no mask")
            if len(perm.order) != self.masks[name].shape[1]:
                raise ValueError(
                    f"the order of the inputs of {name} is of {len(perm.order)}, it has {self.masks[name].shape[1]}"
                )

    def check_side(self) -> None:
        """Raise ValueError unless every side branch fits the mask of its layer, and is finite."""
        for name, branch in self.side.items():
            if name not in self.masks:
                raise ValueError(f"a side branch of {name}, which has no mask")
            if reason := branch.why_not(*self.masks[name].shape):
                raise ValueError(f"the side branch of {name} does not fit: {reason}")
            if not all(bool(factor.isfinite().all()) for factor in (branch.S, branch.X) if factor is not None):
                raise ValueError(f"the side branch of {name} holds NaN or infinity")

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
                cuts = {
                    name: Cut(file.get_tensor(f"cuts.{name}"), spec["num"], spec["kind"])
                    for name, spec in header.get("cuts", {}).items()
                }
                perms = {
                    name: InputOrder(file.get_tensor(f"perms.{name}.order"), file.get_tensor(f"perms.{name}.signature"))
                    for name in header.get("perms", [])
                }
                scales = {name: file.get_tensor(f"scales.{name}") for name in header.get("scales", [])}
                side = {
                    name: SideBranch(
                        file.get_tensor(f"side.{name}.S"),
                        file.get_tensor(f"side.{name}.X") if spec["X"] else None,
                        spec["group"],
                    )
                    for name, spec in header.get("side", {}).items()
                }
                made_by, notes = MadeBy(**header["made_by"]), list(header["notes"])
                curves = {name: file.get_tensor(f"sensitivity.{name}") for name in header.get("sensitivity", [])}
                plan = cls(masks, made_by, notes, cuts, perms, side, scales, curves)
                plan.check_scales()
                plan.check_side()
                plan.check_perms()
                plan.check_cuts()
                return plan
        except Exception as error:
            raise CheckpointError(f"{path} is not a complete sparsekit plan ({error}): make it again") from error


_PLAIN = tuple(field.name for field in fields(Plan) if field.name not in ("scales", "sensitivity"))


def _few(values: Tensor, limit: int = 8) -> str:
    listed = ", ".join(map(str, values[:limit].tolist()))
    return f"[{listed}{', …' if len(values) > limit else ''}]"


def _all_same(these: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return these.keys() == others.keys() and all(_same(each, others[name]) for name, each in these.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other.to(one.device))
