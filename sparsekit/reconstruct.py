"""Local reconstruction (arXiv 2510.14444): refit what pruning kept, until each block does again what the dense one did.

Block by block, in the order in which they run, Adam minimises

    L = sum over tokens of |f(x; W * m) - f0(x0)|^2 / |f0(x0)|^2

over the kept weights (and the norms and biases) of a block f. Here x are the outputs of the student's blocks before it,
which have been refitted already, and x0 those of the dense model's, so that a block also makes up for what those
before it could not. The masks stay. Nothing is ever held but two activations for each token, one block of the dense
model, and what it takes to train one block; minutes, where training the whole model takes days.
"""

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekit.calibration import Walk, load_samples
from sparsekit.calibration.recorder import padding_masks, without_padding
from sparsekit.calibration.walk import Step
from sparsekit.errors import NonFiniteError, PatternError
from sparsekit.nn import grid_of, side_layers, unwrapped
from sparsekit.pack import DAMAGED_SHARE, MOST_ZEROS_OF_24, share_of_zeros
from sparsekit.patterns import NM
from sparsekit.plan import Plan
from sparsekit.progress import Progress, progress_bar
from sparsekit.registry import unknown
from sparsekit.report import Report
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.targets import Entry, find_targets, is_conv1d, weight_NK

_FEWEST_ZEROS = 0.05
"""Share of zeros from which on a layer counts as pruned; rounding to 16 bits leaves a few in any weight."""
_HELD_BACK = 16
"""One batch of so many judges, and is not trained on."""


def reconstruct_(
    model: nn.Module,
    plan: Plan | None = None,
    *,
    dense: nn.Module | Mapping[str, Tensor] | None = None,
    dataset: Any = None,
    tokenizer: Any = None,
    targets: Iterable[Entry] | Entry = ("Linear",),
    ignore: Iterable[Entry] | Entry = ("lm_head",),
    num_calibration_samples: int = 512,
    max_seq_length: int = 2048,
    batch_size: int = 4,
    epochs: int = 4,
    learning_rate: float = 0.02,
    norms_and_biases: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Refit the kept weights of a pruned model in place, block by block, and return the loss of each before and after.

    Works after any method and pattern; zeros stay zeros. A sixteenth of the batches is held back and judges: a block
    that does no better on them keeps the weights that it had, and the notes say so.

    All or nothing: whatever ends the call early, Ctrl-C too, leaves the model bit for bit as it was. Memory, beside the
    model: two activations for each token in its dtype (4 * num_tokens * hidden_size bytes in bfloat16); 16 bytes for
    each weight of one block, for fp32 copies, gradients and Adam; that block's dense weights; and on the CPU a copy
    of the weights that change. Training runs in the model's dtype, on fp32 weights that are rounded for each forward.

    Args:
        model: pruned by `prune_`, `apply_` or another tool, not yet packed.
        plan: says which weights are kept. None: those that are not zero.
        dense: the model as it was before pruning, on any device, or the tensors of it that pruning changed, by name.
        dataset, tokenizer: calibration data, as for `prune_`; text of the kind that the model is to run on.
        targets, ignore: which layers to refit; of these, those that are pruned.
        num_calibration_samples, max_seq_length: how much of the dataset is used; more is better.
        batch_size: samples in one step of Adam.
        epochs: how often each block goes through the samples.
        learning_rate: of Adam, at its peak, as a share of the root mean square of the block's kept weights, so that one
            number does for models of all sizes; it rises for 5 % of the steps and falls along a cosine.
        norms_and_biases: refit these as well.
        seed: of the choice of samples and of their order. Equal seeds give equal bits on one CPU with one number of
            threads.
        progress: show a bar.
    Raises:
        ValueError: a wrong argument; `dense` is missing, of another shape, or pruned itself; nothing is pruned; or the
            weights lie on the grid of a quantised format, which refitting would leave.
        PatternError: a weight was 2:4 once, and something has damaged it.
        NonFiniteError: weights or activations hold NaN or infinity.
    """
    started = time.perf_counter()
    model = unwrapped(model)
    settings = _Settings(epochs, learning_rate, norms_and_biases, seed)
    names = _pruned_layers(model, plan, targets, ignore)
    original = _dense_tensors(model, names, dense)
    samples = load_samples(
        dataset,
        model,
        tokenizer,
        num_samples=num_calibration_samples,
        max_length=max_seq_length,
        batch_size=batch_size,
        seed=seed,
    )
    layers = {name: model.get_submodule(name) for name in names}
    with ExitStack() as stack:
        snapshot = stack.enter_context(restored_on_failure(model))
        stack.enter_context(_without_gradients(model))
        student, teacher = (stack.enter_context(Walk(model, layers, samples.batches)) for _ in range(2))
        bar = stack.enter_context(progress_bar("reconstruct", len(student.steps), progress))
        refit = _Refit(student, teacher, original, plan, settings, snapshot, bar)
        for step in student.steps:
            refit.visit_(step)
    notes = refit.notes + ([samples.note] if samples.note else [])
    used = f"{samples.num_samples} samples of up to {samples.length} tokens"
    better = sum(row["weights"] == "refitted" for row in refit.rows)
    if plan is not None:
        plan.made_by.updates_weights = True  # masks alone no longer repeat the result
        plan.notes += [f"reconstructed: {better} of {len(refit.rows)} blocks refitted on {used}", *notes]
    summary = {
        "refitted": f"{better} of {len(refit.rows)} blocks",
        "data": used,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return Report("Local reconstruction", refit.rows, summary, notes)


@dataclass(frozen=True)
class _Settings:
    """How a block is trained."""

    epochs: int
    learning_rate: float
    norms_and_biases: bool
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.epochs, int) or isinstance(self.epochs, bool) or self.epochs < 1:
            raise ValueError(f"epochs={self.epochs!r} must be a whole number of at least 1")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"learning_rate={rate!r} must be a positive share of the size of a weight, as 0.02")


class _Refit:
    """Takes the student's blocks to where the teacher's are; the teacher is the same model run with dense tensors."""

    def __init__(
        self,
        student: Walk,
        teacher: Walk,
        original: dict[str, Tensor],
        plan: Plan | None,
        settings: _Settings,
        snapshot: Snapshot,
        bar: Progress,
    ) -> None:
        self.student, self.teacher, self.original, self.plan = student, teacher, original, plan
        self.settings, self.snapshot, self.bar = settings, snapshot, bar
        self.model = student.model
        self.masks = [padding_masks(batch) for batch in student.batches]
        num_judging = max(1, len(self.masks) // _HELD_BACK)
        self.judging = range(len(self.masks) - num_judging, len(self.masks))
        self.training = range(self.judging.start or 1)
        self.blocks = {step.block for step in student.steps} - {""}
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []

    def visit_(self, step: Step) -> None:
        """Refit what the step holds, and go on to the next."""
        self.bar.advance(0, str(step))
        self.teacher.weights = self._dense_weights(step)
        outputs = None
        for unit, layers in self._units(step).items():
            outputs = [self.teacher.output_of(unit, index) for index in range(len(self.masks))]
            self._refit_(unit, layers, [_hidden(output) for output in outputs])
        self.teacher.finish(step, outputs)
        self.student.finish(step)
        self.bar.advance()

    def _units(self, step: Step) -> dict[str, dict[str, nn.Module]]:
        """Return what is refitted as one, with its pruned layers: a block, or each layer outside of blocks."""
        if not step.layers or step.block:
            return {step.block: step.layers} if step.layers else {}
        calls = self.student.calls
        for name in step.layers:
            if calls[name] != 1:
                self.notes.append(f"{name}: it runs {calls[name]} times in one forward: left as it is")
        return {name: {name: layer} for name, layer in step.layers.items() if calls[name] == 1}

    def _dense_weights(self, step: Step) -> dict[str, Tensor]:
        """Return the dense tensors, where they differ, of the step and of all that is in no other block."""
        others = tuple(f"{block}." for block in self.blocks - {step.block}) if self.teacher.replays else ()
        own = _tensors_of(self.model)
        found = {}
        for name, tensor in self.original.items():
            if not name.startswith(others):
                there = tensor.to(own[name].device, own[name].dtype)
                if not torch.equal(there, own[name]):
                    found[name] = there
        return found

    def _refit_(self, unit: str, layers: dict[str, nn.Module], targets: list[Tensor]) -> None:
        """Train the unit; write what came out if it does better on the batches that were held back."""
        power = float(sum(without_padding(targets[i], self.masks[i]).double().square().mean() for i in self.training))
        power /= len(self.training)
        before = self._loss(unit, targets, {})
        if not math.isfinite(power + before):
            raise NonFiniteError(
                f"the outputs of {unit} hold NaN or infinity on the calibration data: check the weights of both "
                "models, and that their dtype can hold their activations (bfloat16 where float16 overflows)"
            )
        masters, keeps = self._masters(unit, layers)
        self._train_(unit, targets, masters, keeps, max(power, torch.finfo(torch.float32).tiny))
        new = {name: master.detach().to(self._own(name).dtype) for name, master in masters.items()}
        after = self._loss(unit, targets, new)
        is_better = after < before
        if is_better:
            for name, tensor in new.items():
                self.snapshot.remember(name.rpartition(".")[0])
                self._own(name).copy_(tensor)
        else:
            self.notes.append(f"{unit}: refitting did not help (loss {before:.4g} -> {after:.4g}): left as it was")
        self.rows.append(
            {
                "block": unit,
                "loss before": before,
                "loss after": after if is_better else before,
                "weights": "refitted" if is_better else "as they were",
            }
        )
        self.bar.advance(0, f"{unit}: loss {before:.3g} -> {self.rows[-1]['loss after']:.3g}")

    def _train_(
        self, unit: str, targets: list[Tensor], masters: dict[str, Tensor], keeps: dict[str, Tensor], power: float
    ) -> None:
        """Move the masters, fp32, by Adam; where `keeps` has False, no gradient comes and zero stays zero."""
        generator = torch.Generator().manual_seed(self.settings.seed)
        peak = self.settings.learning_rate * _size_of_kept(masters, keeps)
        optimizer = torch.optim.Adam(masters.values(), lr=peak, betas=(0.9, 0.99))
        num_steps = self.settings.epochs * len(self.training)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rise_and_fall(step, num_steps))
        for _ in range(self.settings.epochs):
            for index in torch.randperm(len(self.training), generator=generator).tolist():
                with torch.enable_grad():
                    weights = {name: master.to(self._own(name).dtype) for name, master in masters.items()}
                    # As a sum, in units of the outputs, the gradients are of a size that float16 holds.
                    loss = self._errors(unit, index, targets[index], weights).square().sum() / power
                    gradients = torch.autograd.grad(loss, list(masters.values()), allow_unused=True)
                for (name, master), gradient in zip(masters.items(), gradients, strict=True):
                    master.grad = gradient if gradient is None or name not in keeps else gradient * keeps[name]
                optimizer.step()
                schedule.step()

    def _loss(self, unit: str, targets: list[Tensor], weights: dict[str, Tensor]) -> float:
        """Return the loss on the batches that judge, with these weights in place of the unit's own."""
        error, power = 0.0, 0.0
        for index in self.judging:
            error += float(self._errors(unit, index, targets[index], weights).square().sum())
            power += float(without_padding(targets[index], self.masks[index]).float().square().sum())
        return error / power if power else error

    def _errors(self, unit: str, index: int, target: Tensor, weights: dict[str, Tensor]) -> Tensor:
        """Return student minus teacher on one batch, fp32 [tokens, features]."""
        self.student.weights = weights
        try:
            output = _hidden(self.student.output_of(unit, index))
        finally:
            self.student.weights = {}
        masks = self.masks[index]
        return without_padding(output, masks).float() - without_padding(target, masks).float()

    def _masters(self, unit: str, layers: dict[str, nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return what to train, by qualified name, as fp32 copies; and `keep` of the weights, as they are stored."""
        keeps = {}
        for name, layer in layers.items():
            w_NK = weight_NK(layer)
            keep_NK = w_NK != 0 if self.plan is None else self.plan.masks[name].to(w_NK.device).keep
            keeps[_weight_of(name)] = keep_NK.T if is_conv1d(layer) else keep_NK
        names = list(keeps) + (_vectors(self.model, unit) if self.settings.norms_and_biases else [])
        masters = {}
        for name in names:
            own = self._own(name)
            masters[name] = own.to(torch.promote_types(own.dtype, torch.float32), copy=True).requires_grad_()
        return masters, keeps

    def _own(self, name: str) -> Tensor:
        return self.model.get_parameter(name).detach()


def _pruned_layers(
    model: nn.Module, plan: Plan | None, targets: Iterable[Entry] | Entry, ignore: Iterable[Entry] | Entry
) -> list[str]:
    """Return the names of the layers to refit; raise where one cannot be."""
    layers = find_targets(model, targets, ignore)
    if plan is not None:
        if plan.scales:
            raise ValueError(_on_a_grid("the plan's layers", plan.format))
        for name, mask in plan.masks.items():
            if name not in dict(model.named_modules()):
                raise ValueError(f"the plan does not fit this model: {unknown('layer', name, list(layers)[:20])}")
            if name in layers and tuple(weight_NK(layers[name]).shape) != mask.shape:
                raise ValueError(f"the plan does not fit this model: {name} is {mask.shape[0]}x{mask.shape[1]} in it")
    pruned = []
    for name, layer in layers.items():
        w_NK = weight_NK(layer)
        if not bool(w_NK.isfinite().all()):
            raise NonFiniteError(f"the weight of {name} holds NaN or infinity: load a sound checkpoint first")
        if grid := grid_of(layer, w_NK):
            raise ValueError(_on_a_grid(name, grid[0]))
        if plan is None:
            if _FEWEST_ZEROS <= share_of_zeros(w_NK) < 1:
                _refuse_damaged(name, w_NK)
                pruned.append(name)
        elif name in plan.masks:
            if bool((w_NK != 0).logical_and_(~plan.masks[name].to(w_NK.device).keep).any()):
                raise ValueError(
                    f"{name} has non-zeros where the plan removes: call sparsekit.apply_(model, plan) first"
                )
            pruned.append(name)
    if not pruned:
        raise ValueError("no layer to refit is pruned: call sparsekit.prune_ first, or widen targets")
    return pruned


def _on_a_grid(what: str, format: str | None) -> str:
    return (
        f"{what}: rounded for {format}, and refitted weights would leave its grid. Reconstruct first, and round "
        "afterwards: prune without a format, reconstruct_, then prune_ with SparseGPT(format=...), which keeps the "
        "zeros, or pack_(model, format)"
    )


def _refuse_damaged(name: str, w_NK: Tensor) -> None:
    """Raise where a few groups of four break 2:4, as pack_ does."""
    broken, groups = NM(2, 4).count_violations(w_NK != 0), w_NK.shape[0] * -(-w_NK.shape[1] // 4)
    if 0 < broken < DAMAGED_SHARE * groups and share_of_zeros(w_NK) < MOST_ZEROS_OF_24:
        raise PatternError(
            f"{name}: {broken:,} of {groups:,} groups of four break 2:4, the others obey it: something changed the "
            "weight after pruning. Apply the plan again with sparsekit.apply_, or pass plan="
        )


def _dense_tensors(
    model: nn.Module, names: list[str], dense: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Return the dense model's tensors by qualified name, in the shapes of `model`; checked."""
    if dense is None:
        raise ValueError(
            "reconstruct_ needs the weights from before pruning: pass dense=, the original model loaded once more, or "
            "let sparsekit.sparsify(model, ..., reconstruct=True) keep them"
        )
    if not isinstance(dense, nn.Module | Mapping):
        raise ValueError(f"dense is a {type(dense).__name__}: pass the original model, or its state dict")
    if isinstance(dense, nn.Module):
        dense = unwrapped(dense)
        if dense is model:
            raise ValueError("dense is the pruned model itself: load the original once more, before or after pruning")
    given = _tensors_of(dense) if isinstance(dense, nn.Module) else dense
    turned = {_weight_of(name) for name, side in side_layers(model).items() if side.source == "Conv1D"}
    found = {}
    for name, own in _tensors_of(model).items():
        if name in given:
            tensor = given[name].detach().T if name in turned and isinstance(dense, nn.Module) else given[name].detach()
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{name} is {list(tensor.shape)} in dense and {list(own.shape)} in the model: pass the model that "
                    "was pruned, as it was before"
                )
            found[name] = tensor
        elif name.endswith("side_S"):
            found[name] = torch.zeros_like(own)
    weights = {name: model.get_submodule(name).get_parameter("weight").detach() for name in names}
    for name in names:
        if _weight_of(name) not in found:
            raise ValueError(
                f"dense lacks {_weight_of(name)}: pass the model that was pruned, as it was before, not packed"
            )
    if all(torch.equal(found[_weight_of(name)].to(own), own) for name, own in weights.items()):
        raise ValueError("dense has the weights of the pruned model: pass the original, loaded once more")
    return found


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return name -> parameter or buffer, detached; of a module that stands in several places, by its first name."""
    return {
        f"{prefix}.{key}" if prefix else key: tensor.detach()
        for prefix, module in model.named_modules()
        for key, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    }


def _weight_of(name: str) -> str:
    """Return the qualified name of a layer's weight; the layer may be the model itself."""
    return f"{name}.weight" if name else "weight"


def _vectors(model: nn.Module, unit: str) -> list[str]:
    """Return the names of the unit's norms and biases: parameters of one dimension that nothing outside shares."""
    places = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    inside = model.get_submodule(unit).named_parameters(prefix=unit)
    return [
        name
        for name, parameter in inside
        if parameter.dim() == 1 and parameter.is_floating_point() and places[id(parameter)] == 1
    ]


def _size_of_kept(masters: dict[str, Tensor], keeps: dict[str, Tensor]) -> float:
    """Return the root mean square of the kept weights."""
    squares = sum(float(masters[name].detach().square().sum()) for name in keeps)
    return math.sqrt(squares / max(1, sum(int(keep.sum()) for keep in keeps.values())))


def _rise_and_fall(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate: up for 5 % of the steps, and down along a cosine."""
    return min(1.0, (step + 1) / (0.05 * num_steps)) * 0.5 * (1 + math.cos(math.pi * step / num_steps))


def _hidden(output: Any) -> Tensor:
    """Return the activations out of what a block gives: the first tensor, as the tuples of transformers have it."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Let no parameter of the model ask for gradients; afterwards each is as it was."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
