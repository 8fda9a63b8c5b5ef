"""Where masks and weights start from: what a one-shot method would leave of the student.

A one-shot method picks units in minutes that gates take thousands of steps to find, and refits the layers that read
them, so that the model goes on nearly as it did. The student has these refitted readers from then on, and its teachers
those that they had: of readers, a third of the weights of the blocks, there are two sets (see `Roles.repair_`). All
other weights are one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from sparsekit.archs import Width
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.calibration import load_samples
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.methods import METHODS
from sparsekit.methods.structured.base import WidthMethod
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.slicegpt import Stream, deaden_, principal_directions, rotate_
from sparsekit.methods.structured.watch import first_tensor
from sparsekit.prune import prune_
from sparsekit.registry import unknown
from sparsekit.snapshot import put_back_afterwards, restored_on_failure
from sparsekit.targets import set_weight_NK_, weight_NK
from sparsekit.thin_stream import check_same_answers
from sparsekit.train.adapters import factors_of, without_adapters
from sparsekit.train.gates import Masks
from sparsekit.train.trainer import from_first_rank
from sparsekit.width_solver import times_known

OPEN_GATES = "open"
"""In place of a method: all units are there at first, and gates find out which go."""
MOST_AT_A_TIME = 8


@dataclass(frozen=True)
class Start:
    """What a one-shot method leaves.

    Attributes:
        masks: name of the width -> bool [num_units], on the CPU.
        repaired: name of a reader -> its parameters by name ("weight", "bias"), with the LoRA in them, on the device.
        notes: of its plan.
    """

    masks: Masks
    repaired: dict[str, dict[str, Tensor]]
    notes: list[str]


def calibration_batch_size(args: TrainingArguments) -> int:
    """Return how many samples calibration takes at a time: as many as training does on all devices, but 8 at most."""
    return min(MOST_AT_A_TIME, args.per_device_train_batch_size * args.world_size)


def starts() -> list[str]:
    """Return what `start` may be."""
    kinds: list[tuple[str, Any]] = METHODS.items()
    fit = [name for name, kind in kinds if issubclass(kind, WidthMethod) and not kind.needs_labels]
    return [OPEN_GATES, *fit]


def check_start(value: Any) -> None:
    """Raise ValueError unless gates can start from it."""
    if value in METHODS and getattr(METHODS.get(value), "needs_labels", False):
        raise ValueError(f"start={value!r} needs labels, and gates start from text alone: use one of {starts()}")
    if value not in starts():
        raise ValueError(unknown("start", value, starts()))


def one_shot(
    adapted: Any,
    widths: list[Width],
    stream: Stream | None,
    masks: Masks | None,
    method: WidthMethod,
    dataset: list[dict[str, Tensor]],
    *,
    targets: Any,
    ignore: Any,
    seed: int,
    batch_size: int = MOST_AT_A_TIME,
    progress: bool,
    table: LatencyTable | None = None,
) -> Start:
    """Return what a method would leave of a student. The model is as before, bit for bit, whatever happens.

    Args:
        adapted: the model with its LoRA, as `add_lora` returned it.
        widths: heads and channels of the student.
        stream: its residual stream, turned already, if the method may make it thinner.
        masks: of the student, with what is closed already; None if all is open.
        method: with its budget, which counts from the dense model.
        dataset: samples without labels.
        targets, ignore, seed, batch_size, progress: as of `prune_`.
        table: times that are known, for a budget in time.
    Raises:
        ValueError, Unsupported: as `prune_` does.
    """
    batches = calibration_batches(adapted, dataset, seed, batch_size)
    factors = factors_of(adapted)
    readers = [width.name for width in widths]
    changed = {*factors, *readers} | (set() if stream is None else {stream.embedding, stream.head, *stream.linears})
    with without_adapters(adapted) as plain, _as_it_is(plain), put_back_afterwards(plain, sorted(changed)):
        before = {name: weight_NK(plain.get_submodule(name)).detach().clone() for name in readers}
        _write_student_(plain, factors, widths, masks or {}, stream)
        with times_known(table):
            plan = prune_(
                plain,
                method,
                dataset=batches,
                targets=targets,
                ignore=ignore,
                num_calibration_samples=len(dataset),
                max_seq_length=max(batch["input_ids"].shape[-1] for batch in batches),
                batch_size=batch_size,
                seed=seed,
                progress=progress,
            )
        parts = {width.name: width.num_units for width in widths}
        if stream is not None:
            parts[stream.embedding] = plain.get_submodule(stream.embedding).get_parameter("weight").shape[1]
        left = {name: torch.ones(size, dtype=torch.bool) for name, size in parts.items()}
        for name, cut in plan.cuts.items():
            left[name][cut.removed] = False
        with torch.no_grad():  # a gate that opens again finds what was there
            for width in widths:
                w_NK = weight_NK(plain.get_submodule(width.name))
                closed = width.columns_of((~left[width.name]).nonzero().flatten()).to(w_NK.device)
                w_NK[:, closed] = before.pop(width.name)[:, closed]
        repaired = {
            reader: {
                name: parameter.detach().clone()
                for name, parameter in plain.get_submodule(reader).named_parameters(recurse=False)
            }
            for reader in readers
        }
    return Start(left, repaired, plan.notes)


def calibration_batches(model: nn.Module, dataset: list[dict[str, Tensor]], seed: int, batch_size: int) -> list[Batch]:
    """Return samples of a training as batches for calibration."""
    longest = max(each["input_ids"].shape[-1] for each in dataset)
    given: dict[str, Any] = {"num_samples": len(dataset), "max_length": longest, "batch_size": batch_size, "seed": seed}
    return load_samples(dataset, model, None, **given).batches


def turned_(model: nn.Module, Q: Tensor | None, batches: list[Batch]) -> Tensor:
    """Turn the residual stream of the plain model to its principal directions, and return these; it computes what it
    did. Taken back where an outer `restored_on_failure` fails.

    Args:
        Q: the directions, if they are known; the same on all processes.
    """
    stream = Stream.of(model)
    if Q is None:
        Q = principal_directions(model, stream, batches)
        device = model.get_submodule(stream.embedding).get_parameter("weight").device
        Q = from_first_rank(Q.to(device)).cpu().contiguous()  # as it comes back from a checkpoint
    with restored_on_failure(model) as snapshot, as_in_inference(model):
        before = first_tensor(run(model, batches[0])).float()
        rotate_(model, stream, Q, snapshot)
        check_same_answers(model, before, first_tensor(run(model, batches[0])).float())
    return Q


@torch.no_grad()
def _write_student_(
    plain: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    widths: list[Width],
    masks: Masks,
    stream: Stream | None,
) -> None:
    """Give the plain model the weights of the student, with zeros where its masks are closed."""
    for name, (B, A) in factors.items():
        if bool(B.any()):
            layer = plain.get_submodule(name)
            set_weight_NK_(layer, torch.addmm(weight_NK(layer).to(B.dtype), B, A))
    for width in widths if masks else ():
        closed = width.columns_of((masks[width.name].cpu() == 0).nonzero().flatten())
        w_NK = weight_NK(plain.get_submodule(width.name))
        w_NK[:, closed.to(w_NK.device)] = 0
    if stream is not None and masks:
        deaden_(plain, stream, int(masks[stream.embedding].sum()))


@contextmanager
def _as_it_is(plain: nn.Module) -> Iterator[None]:
    """Run the model without autocast, that which accelerate wraps its forward in, and that around this."""
    wrapped = vars(plain).pop("forward", None)
    try:
        with torch.autocast(next(plain.parameters()).device.type, enabled=False):
            yield
    finally:
        if wrapped is not None:
            vars(plain)["forward"] = wrapped


def same_everywhere(start: Start) -> Start:
    """Return the start of the first process, on all: sums may be rounded otherwise elsewhere."""
    if not torch.distributed.is_initialized():
        return start
    repaired = {
        reader: {name: from_first_rank(x) for name, x in parameters.items()}
        for reader, parameters in start.repaired.items()
    }
    device = next(iter(next(iter(repaired.values())).values())).device
    masks = {name: from_first_rank(mask.to(device, torch.uint8)).bool().cpu() for name, mask in start.masks.items()}
    return Start(masks, repaired, start.notes)
