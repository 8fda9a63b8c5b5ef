"""Where gates and LoRA start from: what a one-shot method would leave of the student, and its repair as LoRA.

A one-shot method picks units in minutes that gates take thousands of steps to find, and refits the layers that read
them, so that the model goes on nearly as it did. The weights here must stay those of the teachers; so the change D of a
reader is put into the LoRA of that reader, as well as its rank r allows: of all B A of rank r,

    B A = U U^T D,    U: the r first eigenvectors of sum y y^T,   y = D x

comes nearest to D on the inputs x that the reader has in the pruned student (reduced-rank regression).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.calibration import load_samples
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.methods import METHODS
from sparsekit.methods.structured.base import WidthMethod
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.slicegpt import Stream, deaden_, principal_directions, rotate_
from sparsekit.prune import prune_
from sparsekit.registry import unknown
from sparsekit.snapshot import put_back_afterwards, restored_on_failure
from sparsekit.targets import set_weight_NK_, weight_NK
from sparsekit.train.adapters import factors_of, set_factors_, without_adapters
from sparsekit.train.gates import Masks
from sparsekit.train.trainer import from_first_rank
from sparsekit.width_solver import times_known

OPEN_GATES = "open"
"""In place of a method: all units are there at first, and gates find out which go."""
BATCH_SIZE = 8


@dataclass(frozen=True)
class Start:
    """What a one-shot method leaves.

    Attributes:
        masks: name of the width -> bool [num_units], on the CPU.
        factors: name of a layer -> B [N, r] and A [r, K], fp32: all that differs from the weights of the model.
        notes: of its plan.
    """

    masks: Masks
    factors: dict[str, tuple[Tensor, Tensor]]
    notes: list[str]


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
        targets, ignore, seed, progress: as of `prune_`.
        table: times that are known, for a budget in time.
    Raises:
        ValueError, Unsupported: as `prune_` does.
    """
    batches = calibration_batches(adapted, dataset, seed)
    factors = factors_of(adapted)
    readers = [width.name for width in widths]
    changed = {*factors, *readers} | (set() if stream is None else {stream.embedding, stream.head, *stream.linears})
    with without_adapters(adapted) as plain, _as_it_is(plain), put_back_afterwards(plain, sorted(changed)):
        before = {name: weight_NK(plain.get_submodule(name)).detach().clone() for name in readers}
        biases = _biases(plain, readers)
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
                batch_size=BATCH_SIZE,
                seed=seed,
                progress=progress,
            )
        parts = {width.name: width.num_units for width in widths}
        if stream is not None:
            parts[stream.embedding] = plain.get_submodule(stream.embedding).get_parameter("weight").shape[1]
        left = {name: torch.ones(size, dtype=torch.bool) for name, size in parts.items()}
        for name, cut in plan.cuts.items():
            left[name][cut.removed] = False
        change = {}
        for width in widths:
            w_NK = weight_NK(plain.get_submodule(width.name)).detach()
            D = w_NK.float() - before.pop(width.name).float()
            D[:, width.columns_of((~left[width.name]).nonzero().flatten()).to(D.device)] = 0
            if stream is not None:
                D[~left[stream.embedding].to(D.device)] = 0
            change[width.name] = D
        own = {name: D for name, D in change.items() if name in factors and float(D.norm()) > 0}
        written = _outputs(plain, own, batches)
        notes = plan.notes + _left_out(biases, _biases(plain, readers))
    found = {name: (B.float(), A.float()) for name, (B, A) in factors.items() if name not in change}
    for name, D in own.items():
        found[name] = reduced_rank(D, written.pop(name), factors[name][1].shape[0])
    return Start(left, found, notes)


def reduced_rank(D: Tensor, written: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return B [N, r] and A [r, K], fp32, whose product is nearest to D in what it writes; both are as large.

    Args:
        D: [N, K].
        written: sum of y y^T, [N, N], y = D x.
        rank: r; the rows and columns beyond what D has are 0.
    """
    _, U = torch.linalg.eigh(written.double())
    U = U[:, -rank:].flip(1)
    rows = U.T @ D.double()
    root = rows.norm(dim=1).sqrt()
    A = rows / root.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    B = U * root
    short = rank - U.shape[1]
    if short > 0:
        A, B = nn.functional.pad(A, (0, 0, 0, short)), nn.functional.pad(B, (0, short))
    return B.float(), A.float()


def calibration_batches(model: nn.Module, dataset: list[dict[str, Tensor]], seed: int) -> list[Batch]:
    """Return samples of a training as batches for calibration."""
    longest = max(each["input_ids"].shape[-1] for each in dataset)
    given: dict[str, Any] = {"num_samples": len(dataset), "max_length": longest, "batch_size": BATCH_SIZE, "seed": seed}
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
        Q = from_first_rank(Q.to(device)).cpu()
    with restored_on_failure(model) as snapshot:
        rotate_(model, stream, Q, snapshot)
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


def _outputs(model: nn.Module, change: Mapping[str, Tensor], batches: list[Batch]) -> dict[str, Tensor]:
    """Return reader -> sum of y y^T, [N, N] fp32, of what its change writes, y = D x."""
    found = {name: D.new_zeros(len(D), len(D)) for name, D in change.items()}

    def see(name: str, inputs: tuple[Any, ...]) -> None:
        y = inputs[0].detach().flatten(0, -2).float() @ change[name].T  # outside of autocast
        found[name].addmm_(y.T, y)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: see(name, args))
        for name in change
    ]
    try:
        with as_in_inference(model):
            for batch in batches:
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _biases(plain: nn.Module, readers: list[str]) -> dict[str, Tensor]:
    """Return reader -> copy of its bias, of those that have one."""
    own = {name: plain.get_submodule(name)._parameters.get("bias") for name in readers}
    return {name: bias.detach().clone() for name, bias in own.items() if bias is not None}


def _left_out(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> list[str]:
    """Say which biases a method changed: LoRA has none."""
    changed = [name for name, bias in before.items() if not torch.equal(bias, after[name])]
    if not changed:
        return []
    return [f"what the start would add to {len(changed)} biases, as of {changed[0]}, is left out: LoRA has none"]


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


def take_up_(adapted: Any, start: Start) -> None:
    """Give the LoRA its first values; layers that a start says nothing of keep theirs."""
    for name, (B, A) in start.factors.items():
        set_factors_(adapted, name, B, A)


def same_everywhere(start: Start, device: torch.device) -> Start:
    """Return the start of the first process, on all: sums may be rounded otherwise elsewhere.

    Args:
        device: of the processes' communication.
    """
    if not torch.distributed.is_initialized():
        return start
    masks = {name: from_first_rank(mask.to(device, torch.uint8)).bool().cpu() for name, mask in start.masks.items()}
    factors = {
        name: (from_first_rank(B.to(device)), from_first_rank(A.to(device))) for name, (B, A) in start.factors.items()
    }
    return Start(masks, factors, start.notes)
