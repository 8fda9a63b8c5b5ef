"""Decide what goes, layer by layer, with data where the method needs it."""

import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Coupling, find_blocks, find_couplings, fold_order_, fold_scales_
from sparsekit.calibration import Hessian, Statistics, Walk, load_samples
from sparsekit.errors import NonFiniteError
from sparsekit.masks import Mask
from sparsekit.methods import (
    AWQ,
    Decision,
    Magnitude,
    OneShot,
    StructuredMethod,
    Trained,
    is_trained,
    method_config,
)
from sparsekit.methods.channel_order import coupled_order
from sparsekit.methods.grid import is_quantised
from sparsekit.methods.wide import WideWeight
from sparsekit.nn import SideLinear, remember_grid_
from sparsekit.patterns import NM
from sparsekit.plan import InputOrder, MadeBy, Plan, SideBranch
from sparsekit.progress import Progress, progress_bar
from sparsekit.prune_structured import shrink_
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.targets import Entry, find_targets, set_weight_NK_, show_entries, weight_NK
from sparsekit.version import __version__


def prune_(
    model: nn.Module,
    method: str | OneShot | StructuredMethod | Trained,
    *,
    dataset: Any = None,
    tokenizer: Any = None,
    targets: Iterable[Entry] | Entry = ("Linear",),
    ignore: Iterable[Entry] | Entry = ("lm_head",),
    num_calibration_samples: int = 128,
    max_seq_length: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> Plan:
    """Prune the model's linear layers in place, and return the plan: what was kept, by which method, from what data.

    Layers stay what they are, with exact zeros where weights were removed. Calibrated methods go block by block, each
    block on the outputs of the pruned ones before it. Where the config names a quantised `format`, kept weights end on
    its grid, and `pack_(model, format, scales=plan.scales)` changes no value.

    All or nothing: whatever ends the call early, Ctrl-C too, leaves the model bit for bit as it was. To that end each
    weight is copied to the CPU before it changes, which in the end takes as much CPU memory as the pruned layers do.

    Args:
        model: a transformers model, or any `nn.Module` with linear layers.
        method: "magnitude", "wanda", "sparsegpt", "ria", "alps", or a config, as `SparseGPT(pattern="2:4")`; a
            structured one, as "contribution" or `KCM(constraints={"flops": "60%"})`, whose parts that go are made dead
            here and cut out by `apply_`; or the config of a method that trains, as `sparsekit.AST(max_steps=300)`,
            which then goes by its own number of samples, lengths, batch size and seed.
        dataset: calibration data; see `load_samples` for all that is accepted. Magnitude needs none.
        tokenizer: for a dataset of text.
        targets: which layers; see `find_targets`.
        ignore: which of them not.
        num_calibration_samples: samples used, at most.
        max_seq_length: tokens a sample, at most.
        batch_size: samples run together.
        seed: of the choice of samples. The same seed gives the same weights, bit for bit, on the same machine
            with the same number of threads.
        progress: show a bar.
    Raises:
        ValueError: a wrong argument, a method that needs data and got none, or weights that are all zero already.
        NonFiniteError: weights or activations hold NaN or infinity.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    config = method_config(method)
    if is_trained(config):
        return config.train_(model, dataset, tokenizer, targets=targets, ignore=ignore, progress=progress)
    # Iterables are read more than once.
    targets, ignore = (
        each if isinstance(each, str) or callable(each) else list(each or ()) for each in (targets, ignore)
    )
    made_by = MadeBy(
        method=config.name,
        config=config.to_dict(),
        base_model=_name_of(model),
        seed=seed,
        versions=installed_versions(),
        updates_weights=config.updates_weights,
        targets=show_entries(targets),
        ignore=show_entries(ignore),
    )
    if isinstance(config, StructuredMethod):
        plan = Plan(made_by=made_by)
        shrink_(
            model,
            config,
            plan,
            dataset=dataset,
            tokenizer=tokenizer,
            targets=targets,
            ignore=ignore,
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
        return plan
    layers = find_targets(model, targets, ignore)
    if config.statistics is not None and dataset is None:
        raise ValueError(
            f"{config.name} needs calibration data: pass dataset=[...texts...] and tokenizer=..., "
            "a list of token tensors, or use method='magnitude'"
        )
    _refuse_non_finite(layers)
    layers, empty = _without_empty(layers)
    plan = Plan(made_by=made_by, notes=_notes_on_model(model, layers, config))
    if empty:
        plan.notes.append(f"{_some(empty)}: every weight is zero already: left as it is")
    with restored_on_failure(model) as snapshot:
        pruner = _Pruner(config, plan, snapshot)
        if config.permute and not pruner.reorderable(layers):
            plan.notes.append("permute=True: no layer has inputs that what produces them could give in another order")
        pruner.note_unscalable(layers)
        if config.statistics is None:
            with progress_bar(f"{config.name} {config.pattern}", len(layers), progress) as bar:
                pruner.reorder_(layers, {})
                pruner.prune_(layers, {}, bar)
        else:
            samples = load_samples(
                dataset,
                model,
                tokenizer,
                num_samples=num_calibration_samples,
                max_length=max_seq_length,
                batch_size=batch_size,
                seed=seed,
            )
            made_by.data_digest = samples.digest
            made_by.num_samples, made_by.sample_length = samples.num_samples, samples.length
            plan.notes += [samples.note] if samples.note else []
            with Walk(model, layers, samples.batches) as walk:
                with progress_bar(f"{config.name} {config.pattern}", len(walk.steps), progress) as bar:
                    for step in walk.steps:
                        bar.advance(0, str(step))
                        if step.layers:
                            statistics = walk.measure(step, config.statistics)
                            with walk.unchanged(step, pruner.reorderable(step.layers)):
                                statistics = pruner.reorder_(step.layers, statistics)
                            if pruner.scales:  # after the masks, which it must not change
                                pruner.prune_unrounded_(step.layers, statistics)
                                with walk.unchanged(step, pruner.scalable(step.layers), "method='sparsegpt'"):
                                    statistics = pruner.scale_(step.layers, statistics)
                            pruner.prune_(step.layers, statistics)
                            del statistics  # of one block at a time
                        walk.finish(step)
                        bar.advance()
    plan.masks = {name: plan.masks[name] for name in layers}
    plan.scales = {name: plan.scales[name] for name in layers if name in plan.scales}
    plan.notes += pruner.notes()
    return plan


class _Pruner:
    """Applies one method to layers, and gathers masks and notes."""

    def __init__(self, config: OneShot, plan: Plan, snapshot: Snapshot) -> None:
        self.config, self.plan, self.snapshot = config, plan, snapshot
        self.scales = isinstance(config, AWQ) and is_quantised(config.format)
        self._couplings = find_couplings(snapshot.model) if config.permute or self.scales else []
        self._said: dict[str, list[str]] = {}

    def reorderable(self, layers: dict[str, nn.Module]) -> list[str]:
        """Return which of the layers may have their inputs reordered."""
        return [name for coupling in self._reorderable(layers) for name in coupling.consumers]

    def scalable(self, layers: dict[str, nn.Module]) -> list[str]:
        """Return which of the layers may have their inputs scaled, without those whose outputs may be."""
        couplings = self._scalable(layers)
        producers = {producer.name for coupling in couplings for producer in coupling.producers}
        return [name for coupling in couplings for name in coupling.consumers if name not in producers]

    def _reorderable(self, layers: dict[str, nn.Module]) -> list[Coupling]:
        couplings = self._couplings if self.config.permute else []
        return [each for each in couplings if each.can_permute and layers.keys() >= set(each.consumers)]

    def _scalable(self, layers: dict[str, nn.Module]) -> list[Coupling]:
        couplings = self._couplings if self.scales else []
        return [each for each in couplings if each.can_scale and layers.keys() >= set(each.consumers)]

    def note_unscalable(self, layers: dict[str, nn.Module]) -> None:
        """Say which inputs cannot be scaled, where they are to be."""
        if isinstance(self.config, AWQ) and not self.scales:
            warnings.warn(
                "awq scales inputs for a quantised format, and none is given: this is SparseGPT, and packing to one "
                "would round to nearest. Pass AWQ(format='semi24_int4')",
                stacklevel=3,
            )
        if not self.scales:
            return
        if not self._scalable(layers):
            self.plan.notes.append(f"{self.config.name}: no layer has inputs that what produces them could give scaled")
        for name, layer in layers.items():
            if isinstance(layer, SideLinear) and layer.side_X is None:
                self._say("its inputs were not scaled, for its side branch sums them in groups", name)

    def reorder_(
        self, layers: dict[str, nn.Module], statistics: dict[str, Statistics | None]
    ) -> dict[str, Statistics | None]:
        """Put inputs into the order that keeps most, with what produces them, and return the statistics in it, too."""
        pattern, reordered = self.config.parsed_pattern, dict(statistics)
        for coupling in self._reorderable(layers):
            names = coupling.consumers
            known = [statistics.get(name) for name in names]
            if self.config.statistics is not None and None in known:
                continue
            assert isinstance(pattern, NM)
            weights = [weight_NK(layers[name]) for name in names]
            scores = [self.config.scores(w_NK.float(), seen) for w_NK, seen in zip(weights, known, strict=True)]
            order = coupled_order(coupling, torch.cat(scores), pattern)
            if order is None:
                continue
            for part in (*names, *(producer.name for producer in coupling.producers)):
                self.snapshot.remember(part)
            inputs = coupling.input_order(order)
            for name, w_NK, seen in zip(names, weights, known, strict=True):
                self.plan.perms[name] = InputOrder(inputs.cpu(), InputOrder.signature_of(w_NK))
                reordered[name] = seen.reordered(inputs) if seen is not None else None
            fold_order_(self.snapshot.model, coupling, order)
        return reordered

    @torch.no_grad()
    def prune_unrounded_(self, layers: dict[str, nn.Module], statistics: dict[str, Statistics | None]) -> None:
        """Prune the weights that do not obey the pattern yet, and round nothing."""
        assert isinstance(self.config, AWQ)
        for name, seen in statistics.items():
            if isinstance(seen, Hessian):
                decision = self.config.pruned(weight_NK(layers[name]).float(), seen)
                if decision.weight is not None:
                    self._write_(name, layers[name], decision)

    def scale_(
        self, layers: dict[str, nn.Module], statistics: dict[str, Statistics | None]
    ) -> dict[str, Statistics | None]:
        """Scale inputs so that rounding costs least, with what produces them; return the statistics so scaled, too."""
        assert isinstance(self.config, AWQ)
        scaled = dict(statistics)
        for coupling in self._scalable(layers):
            seen = statistics.get(coupling.consumers[0])
            if not isinstance(seen, Hessian) or any(statistics.get(name) is None for name in coupling.consumers):
                continue
            scales = self.config.input_scales(coupling, [weight_NK(layers[name]) for name in coupling.consumers], seen)
            if scales is None:
                continue
            for part in (*coupling.consumers, *(producer.name for producer in coupling.producers)):
                self.snapshot.remember(part)
            fold_scales_(self.snapshot.model, coupling, scales)
            scaled |= dict.fromkeys(coupling.consumers, seen.scaled(scales[coupling.source.to(scales.device)]))
        return scaled

    def prune_(
        self, layers: dict[str, nn.Module], statistics: dict[str, Statistics | None], bar: Progress | None = None
    ) -> None:
        # In the order in which the layers ran, so that those that share statistics follow one another.
        for name in statistics or layers:
            layer = layers[name]
            if isinstance(layer, SideLinear) and self.config.format is not None and is_quantised(self.config.format):
                self._write_wide_(name, layer, statistics.get(name))
            else:
                self._write_(name, layer, self._decide(weight_NK(layer), statistics.get(name)))
            if bar is not None:
                bar.advance(1, name)

    def _write_wide_(self, name: str, layer: SideLinear, statistics: Statistics | None) -> None:
        """Round a weight together with the branch beside it."""
        assert self.config.format is not None
        wide = WideWeight.of(layer, self.config.parsed_pattern, self.config.format)
        decision, S = wide.split(self._decide(wide.weight, wide.statistics(statistics)))
        self._write_(name, layer, decision)
        with torch.no_grad():
            layer.side_S.copy_(S)
            if layer.side_X is not None and wide.X is not None:
                layer.side_X.copy_(wide.X)
        X = None if layer.side_X is None else layer.side_X.detach().cpu().clone()
        self.plan.side[name] = SideBranch(layer.side_S.detach().cpu().clone(), X, layer.group)

    def _write_(self, name: str, layer: nn.Module, decision: Decision) -> None:
        w_NK = _pruned(weight_NK(layer), decision)
        if not w_NK.isfinite().all():
            raise NonFiniteError(f"the pruned weight of {name} does not fit {w_NK.dtype}: prune the model in bfloat16")
        self.snapshot.remember(name)
        set_weight_NK_(layer, w_NK)
        self.plan.masks[name] = Mask(self.config.parsed_pattern, decision.keep).to("cpu")
        if decision.scales is not None and self.config.format is not None:
            self.plan.scales[name] = decision.scales.cpu()
            remember_grid_(layer, self.config.format, self.plan.scales[name])
        for note in decision.notes:
            self._say(note, name)

    def _say(self, note: str, name: str) -> None:
        self._said.setdefault(note, []).append(name)

    @torch.no_grad()
    def _decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        if self.config.statistics is None or statistics is not None:
            decision = self.config.decide(w_NK.float(), statistics)
        else:
            keep = Magnitude(pattern=self.config.pattern, sparsity=self.config.sparsity).decide(w_NK.float()).keep
            decision = Decision(keep, notes=("no calibration token reached it: pruned by magnitude",))
        return self.config.rounded(w_NK, decision)

    def notes(self) -> list[str]:
        return [f"{_some(names)}: {note}" for note, names in self._said.items()]


def _pruned(w_NK: Tensor, decision: Decision) -> Tensor:
    new = w_NK if decision.weight is None else decision.weight.to(w_NK.dtype)
    return new.masked_fill(~decision.keep, 0)


def _refuse_non_finite(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        if not bool(weight_NK(layer).isfinite().all()):
            raise NonFiniteError(f"the weight of {name} holds NaN or infinity: load a sound checkpoint first")


def _without_empty(layers: dict[str, nn.Module]) -> tuple[dict[str, nn.Module], list[str]]:
    """Take out the layers without any weight but zero (an adapter not yet trained); their names come second."""
    empty = [name for name, layer in layers.items() if not bool(weight_NK(layer).any())]
    if len(empty) == len(layers):
        raise ValueError(
            f"every weight of {_some(empty)} is zero already, so there is nothing to prune: load trained weights first"
        )
    return {name: layer for name, layer in layers.items() if name not in set(empty)}, empty


def _notes_on_model(model: nn.Module, layers: dict[str, nn.Module], config: OneShot) -> list[str]:
    notes = []
    pattern = config.parsed_pattern
    if isinstance(pattern, NM):
        odd = [name for name, layer in layers.items() if weight_NK(layer).shape[1] % pattern.m]
        if odd:
            notes.append(
                f"{_some(odd)}: in_features is no multiple of {pattern.m}, so the last group of each row is shorter"
            )
    blocks = [block for names in find_blocks(model, layers).values() for block in names]
    stacked = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 3 and any(name.startswith(f"{block}.") for block in blocks)
    ]
    if stacked:
        notes.append(f"{_some(stacked)}: stacked expert weights are no Linear layers and stay dense")
    return notes


def _name_of(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__)


def installed_versions() -> dict[str, str]:
    """Return the versions that a result depends on, for `MadeBy`."""
    found = {"sparsekit": __version__}
    for name, package in (("torch", "torch"), ("transformers", "transformers")):
        try:
            found[name] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _some(names: list[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
