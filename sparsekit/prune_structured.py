"""Make a model narrower or shorter: which heads, channels or blocks go, and what the layers that read them do about it.

The model keeps its shapes here. What goes is made dead, by zeros in the columns that read it, and `apply_` cuts it out:
so the plan can be looked at, tried and saved before anything is cut, and cutting changes no output.

Two passes over the data. In the first one, on the dense model, the method finds out what units are worth, and the
solver of budgets how many stay in each layer. The second goes block by block from the bottom; there the method decides
about each reader in turn, with the inputs that it has by then and the sums that it should bring about (`watch`). The
teacher that says so is the same model, run with its old weights on its own inputs.
"""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width, find_blocks, find_widths
from sparsekit.calibration import Walk, load_samples
from sparsekit.calibration.samples import Batch
from sparsekit.calibration.walk import Step
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.methods.structured.allocation import best_units
from sparsekit.methods.structured.base import Job, StructuredMethod, WidthMethod
from sparsekit.methods.structured.biases import give_biases_
from sparsekit.methods.structured.depth import Depth
from sparsekit.methods.structured.inputs import InputSums, check_inputs, check_tokens
from sparsekit.methods.structured.labels import labelled_batches
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import only_columns
from sparsekit.methods.structured.sensitivity import judging_batches
from sparsekit.methods.structured.slicegpt import SliceGPT
from sparsekit.methods.structured.watch import Tokens, Watcher, first_only_readers
from sparsekit.nn import SideLinear, sparse_layers
from sparsekit.plan import Cut, Plan
from sparsekit.progress import Progress, progress_bar
from sparsekit.shorten import shorten_
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.targets import Entry, find_targets, is_conv1d, set_weight_NK_, weight_NK
from sparsekit.thin_stream import Thinner, thin_alone_
from sparsekit.width_solver import WidthSolver


def shrink_(
    model: nn.Module,
    config: StructuredMethod,
    plan: Plan,
    *,
    dataset: Any,
    tokenizer: Any,
    targets: Iterable[Entry] | Entry,
    ignore: Iterable[Entry] | Entry,
    num_calibration_samples: int,
    max_seq_length: int,
    batch_size: int,
    seed: int,
    progress: bool,
) -> None:
    """Make parts of a model dead in place, and write what is left of them into the plan.

    Arguments as for `prune_`, which this is part of.

    Raises:
        ValueError: a wrong argument, no data or labels where the method needs them, or a budget that no legal widths
            reach; the nearest are named.
        Unsupported: the model is of a family whose parts are not known.
        NonFiniteError: weights or activations hold NaN or infinity.
    """
    if packed := sparse_layers(model):
        raise ValueError(f"{next(iter(packed))} is packed: unpack_ the model before it is made smaller")
    layers = find_targets(model, targets, ignore)
    given: dict[str, Any] = {
        "num_samples": num_calibration_samples,
        "max_length": max_seq_length,
        "batch_size": batch_size,
        "seed": seed,
    }
    batches: list[Batch] = []
    if config.needs_labels:
        batches = labelled_batches(dataset, model, tokenizer, **given)
    elif config.needs_data:
        if dataset is None:
            raise ValueError(
                f"{config.name} needs calibration data: pass dataset=[...texts...] and tokenizer=..., a list of token "
                "tensors, or use method='magnitude_sp'"
            )
        samples = load_samples(dataset, model, tokenizer, **given)
        batches, plan.made_by.data_digest = samples.batches, samples.digest
        plan.made_by.sample_length = samples.length
        plan.notes += [samples.note] if samples.note else []
    check_tokens(batches, tokenizer)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        if any("decoder_input_ids" not in batch and "labels" not in batch for batch in batches):
            raise Unsupported(
                f"{type(model).__name__} reads two texts at a time, and the dataset has one: pass batches with "
                "input_ids and decoder_input_ids"
            )
    plan.made_by.num_samples = sum(len(next(iter(batch.values()))) for batch in batches)
    with restored_on_failure(model) as snapshot:
        if isinstance(config, WidthMethod):
            with progress_bar(config.name, 1, progress) as bar:
                _narrow_(model, config, plan, layers, batches, snapshot, bar, seed)
        elif isinstance(config, Depth):
            with progress_bar(config.name, 1, progress) as bar:
                shorten_(model, config, plan, layers, batches, snapshot, bar)
        elif isinstance(config, SliceGPT):
            with progress_bar(config.name, 1, progress) as bar:
                thin_alone_(model, config, plan, layers, batches, snapshot, bar)


def _narrow_(
    model: nn.Module,
    config: WidthMethod,
    plan: Plan,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    snapshot: Snapshot,
    bar: Progress,
    seed: int,
) -> None:
    """Take out heads and channels; a width takes part if all layers that it touches are targets."""
    widths = targeted_widths(find_widths(model), layers)
    plan.notes += left_whole_notes(model, widths, layers)
    solver = WidthSolver(model, config, widths, batches)
    own = [width for width in widths if width.kind in config.kinds]
    if config.wants_biases and (left := give_biases_(model, own, snapshot)):
        plan.notes.append(f"{left[0]} has no bias, nor can its config ask for one: nothing stands for means there")
    solver.recount(model)
    inputs = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    why_whole = Thinner.refusal(model, layers, config.thins, solver.budget.measure)
    if why_whole and config.thins:
        raise ValueError(f"hidden=True, and hidden dimensions cannot go: {why_whole}")
    if why_whole:  # before long work
        solver.check()
    bar.expect(2 * len(own))  # half of them for what units are worth
    job = Job(model, own, inputs, solver, bar, seed, labelled=batches, notes=plan.notes)
    if config.second_pass is Moments:
        tuned = [width.name for width in own if config.fits_first_only(width)]
        job.first_only = first_only_readers(model, tuned, inputs[0])
    if not why_whole:
        bar.advance(0, "principal directions")
        job.thinner = Thinner(model, inputs, judging_batches(inputs), config.round_to, config.turns)
    job.scores = config.score(job)
    counts = config.count(job)
    plan.sensitivity = job.sensitivity
    bar.advance(len(own) - len(job.sensitivity))
    plan.notes += solver.notes(counts)
    whole: dict[str, Tensor] = {}
    if job.thinner is not None and job.thinner.num_kept < job.thinner.size:
        whole = job.thinner.thin_(plan, snapshot)
    _Readers(job, config, counts, snapshot, plan, whole).prune_()


class _Readers:
    """The second pass: takes each reader to what the method decides.

    Args:
        whole: weights of the teacher by name, where the model's residual stream was made thinner; else none.
    """

    def __init__(
        self,
        job: Job,
        config: WidthMethod,
        counts: dict[str, int],
        snapshot: Snapshot,
        plan: Plan,
        whole: dict[str, Tensor],
    ) -> None:
        self.job, self.config, self.counts, self.snapshot, self.plan = job, config, counts, snapshot, plan
        self.whole = whole
        self.teacher_counts = config.teacher(job)

    @torch.no_grad()
    def prune_(self) -> None:
        kind = self.config.second_pass
        if kind is None:
            for width in self.job.widths:
                self._decide_(width, None)
                self.job.bar.advance()
            return
        layers = {width.name: self.job.model.get_submodule(width.name) for width in self.job.widths}
        with ExitStack() as stack:
            student = stack.enter_context(Walk(self.job.model, layers, self.job.batches))
            teacher = None if kind is InputSums else stack.enter_context(Walk(self.job.model, layers, self.job.batches))
            for step in student.steps:
                self.job.bar.advance(0, f"{self.config.name} {step}")
                self._visit_(step, student, teacher)

    def _visit_(self, step: Step, student: Walk, teacher: Walk | None) -> None:
        widths = [width for width in self.job.widths if width.name in step.layers]
        if widths and not step.block:
            raise Unsupported(
                f"{widths[0].name} is in a block that runs {student.calls[widths[0].name]} times in one forward, so it "
                "has no inputs of its own: method='magnitude_sp' prunes it without data"
            )
        names = [width.name for width in widths]
        targets: dict[str, list[Tensor]] = {}
        if teacher is not None and step.block:
            teacher.weights = self._teacher_weights(step, teacher)
            watcher = Watcher(teacher, step, names, self.job.joins)
            outputs = []
            for index in range(len(self.job.batches)):
                output, seen = watcher.look(index, names)
                outputs.append(output)
                for name, each in seen.items():
                    targets.setdefault(name, []).append(each.sums)
            teacher.finish(step, outputs)
        watcher = Watcher(student, step, names, self.job.joins)
        for width in widths:
            self._decide_(width, self._see(watcher, width, targets.pop(width.name, None)))
            self.job.bar.advance()
        student.finish(step)

    def _see(self, watcher: Watcher, width: Width, targets: list[Tensor] | None) -> InputSums | Moments | None:
        """Return what the method wants to know about a reader."""
        if targets is not None and self.job.failure:
            return None
        found: InputSums | Moments | None = None
        for index, batch in enumerate(self.job.batches):
            seen = watcher.glance(index, width.name)
            tokens = Tokens.of(batch, width.name in self.job.first_only)
            a_MK = tokens.pick(seen.inputs)
            if targets is None:
                found = found or InputSums(a_MK.shape[-1], a_MK.device)
                assert isinstance(found, InputSums)
                found.add(a_MK)
            else:
                t = targets[index].float() - (seen.sums.float() - seen.outputs.float())
                if self.whole:
                    assert self.job.thinner is not None
                    t[..., self.job.thinner.num_kept :] = 0
                found = found or Moments(a_MK.shape[-1], t.shape[-1], a_MK.device)
                assert isinstance(found, Moments)
                found.add(a_MK, tokens.pick(t))
        if found is not None:
            num_tokens = found.num_tokens if isinstance(found, InputSums) else found.weight
            check_inputs(width.name, num_tokens, found.is_finite())
        return found

    def _teacher_weights(self, step: Step, teacher: Walk) -> dict[str, Tensor]:
        """Return the weights with which the model is the teacher, where they are not its own."""
        originals = {} if teacher.replays else self.snapshot.originals()
        if self.whole:  # all that runs up to this block: blocks that are done stand in for themselves
            others = f"{step.chain}." if teacher.replays else ""
            originals = {
                name: tensor
                for name, tensor in self.whole.items()
                if name.startswith(f"{step.block}.") or not (others and name.startswith(others))
            }
        found = {name: tensor.to(self.job.model.get_parameter(name)) for name, tensor in originals.items()}
        for width in self.job.widths if self.teacher_counts is not None else ():
            if teacher.replays and width.name not in step.layers:
                continue
            assert self.teacher_counts is not None
            reader, name = self.job.reader(width), f"{width.name}.weight"
            kept = best_units(self.job.scores[width.name], self.teacher_counts[width.name])
            stored = found.get(name, reader.layer.get_parameter("weight").detach())
            w_NK = only_columns(stored.T if is_conv1d(reader.layer) else stored, reader.columns_of(kept))
            found[name] = w_NK.T if is_conv1d(reader.layer) else w_NK
        return found

    def _decide_(self, width: Width, seen: InputSums | Moments | None) -> None:
        """Ask the method, and write down what it says, in the model and in the plan."""
        reader, num = self.job.reader(width), self.counts[width.name]
        if num == width.num_units and not self.config.updates_weights:
            return
        decided = self.config.decide(self.job, reader, num, seen)
        if num < width.num_units:
            self.plan.cuts[width.name] = Cut(decided.kept, width.num_units, width.kind)
        w_NK = decided.reader.weight.to(reader.layer.get_parameter("weight").dtype)
        if not bool(w_NK.isfinite().all()):
            raise NonFiniteError(
                f"the pruned weight of {width.name} does not fit {w_NK.dtype}: prune the model in bfloat16"
            )
        self.snapshot.remember(width.name)
        set_weight_NK_(reader.layer, w_NK)
        if decided.reader.bias is not None:
            reader.layer.get_parameter("bias").copy_(decided.reader.bias)


def left_whole_notes(model: nn.Module, widths: list[Width], layers: Mapping[str, nn.Module]) -> list[str]:
    """Say which targets in blocks belong to no width, if any do, so that the budget is not about them."""
    known = {name for width in widths for name in (width.name, *(rows.name for rows in width.producers))}
    blocks = [f"{block}." for names in find_blocks(model, layers).values() for block in names]
    others = [name for name in layers if name not in known and name.startswith(tuple(blocks))]
    if not others:
        return []
    return [
        f"{len(others)} layers of blocks, as {others[0]}, belong to no heads or channels that can go, and stay whole"
    ]


def targeted_widths(widths: list[Width], layers: Mapping[str, nn.Module]) -> list[Width]:
    """Return the widths all of whose layers are among these."""
    found = [width for width in widths if {width.name, *(rows.name for rows in width.producers)} <= layers.keys()]
    if not found:
        raise ValueError(
            f"targets and ignore leave no width whole: {widths[0].name} goes with "
            f"{', '.join(sorted({rows.name for rows in widths[0].producers}))}; name them all, or none"
        )
    for name in {name for width in found for name in (width.name, *(rows.name for rows in width.producers))}:
        if isinstance(layers[name], SideLinear):
            raise ValueError(f"{name} has a side branch, which cannot be cut: fold it in with sparsekit.nn.merge_side_")
        if not bool(weight_NK(layers[name]).isfinite().all()):
            raise NonFiniteError(f"the weight of {name} holds NaN or infinity: load a sound checkpoint first")
    return found
