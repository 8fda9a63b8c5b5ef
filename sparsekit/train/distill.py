"""Distillation: a student is pulled towards the next-token distribution of the dense original.

L = kd_weight * T^2 KL(q || p) + ce_weight * CE, a mean over tokens (arXiv 1503.02531; AST, arXiv 2407.20584, section
3.3), q and p the distributions of teacher and student at temperature T. AST and MiniLLM find the reverse KL(p || q) as
good.

Logits dominate the memory: 4096 tokens at a vocabulary of 128 k are 1 GiB in bf16, and plain autograd keeps several
copies, in fp32. Here the gradient is known in closed form, so the forward pass computes it along with the loss, a chunk
of tokens at a time, and writes it over the student's logits, of which there is then one copy ever. The teacher's are
made from its hidden states one chunk at a time (`Head`), or come from a cache (`TopK`).

On a GPU with Triton this is one fused kernel (`sparsekit_kernels.kd_loss`); elsewhere, in float64, and against a cache,
it is torch, and the same but for the order of summation.

The gradient is stored per token, without the division by the number of tokens, and the backward pass scales it in
float32: fp16 then loses nothing to underflow, whatever the number of tokens and the loss scale.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsekit_kernels import target
from sparsekit_kernels.reference import IGNORE_INDEX, cross_entropy, divergence, kd_loss_reference
from torch import Tensor

KINDS = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class Head:
    """A teacher as its last hidden states and what makes logits of them, one chunk of tokens at a time.

    Attributes:
        hidden: [..., d].
        head: maps [m, d] to logits [m, V]; called without gradient.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class TopK:
    """A teacher as its k likeliest tokens; the others form one bucket that has the rest of the probability.

    Attributes:
        ids: [..., k] integers, distinct within a token.
        log_probs: [..., k], log of the probabilities at the temperature of the loss, over the whole vocabulary.
    """

    ids: Tensor
    log_probs: Tensor


TeacherOutput = Tensor | Head | TopK


@dataclass(frozen=True)
class DistillationLoss:
    """What `distillation_loss` returns: total = kd_weight * kd + ce_weight * ce.

    Attributes:
        total: scalar with gradient.
        ce: cross-entropy in nats per token, detached.
        kd: T^2 times the divergence from the teacher in nats per token, detached; 0 without a teacher.
    """

    total: Tensor
    ce: Tensor
    kd: Tensor


def distillation_loss(
    student_logits: Tensor,
    teacher: TeacherOutput | None,
    labels: Tensor,
    *,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
    kind: str = "forward_kl",
    chunk_tokens: int = 1024,
    num_items: int | Tensor | None = None,
    inplace: bool = True,
) -> DistillationLoss:
    """Return the loss of a student against its teacher and the labels, averaged over the tokens that count.

    Args:
        student_logits: [..., V], any floating dtype. Where a gradient is wanted and `inplace`, they are overwritten
            with it: hand in what came out of the head, and do not read it again. Nothing in the graph of a linear
            layer needs its output; where something else does (an activation after the head), autograd says so in the
            backward pass. Without gradient (under `no_grad`) they stay as they are. Shift the labels rather than the
            logits: the gradient of a slice is a second copy.
        teacher: logits [..., V], `Head`, `TopK`, or None for the cross-entropy alone. Not computed where `kd_weight`
            is 0.
        labels: [...] integers, the token that follows each position; -100 where it counts for nothing.
        kd_weight: weight of the divergence.
        ce_weight: weight of the cross-entropy.
        temperature: T, that of the divergence; the cross-entropy is at 1.
        kind: "forward_kl" is KL(teacher || student), "reverse_kl" is KL(student || teacher).
        chunk_tokens: tokens for which float32 copies of logits exist at a time.
        num_items: divide the sums by this (the tokens of all micro-batches of a step) rather than by the number of
            tokens that count here. With neither, the loss is 0.
        inplace: False allocates the gradient and keeps the logits.
    Raises:
        ValueError: shapes do not fit, the teacher has another vocabulary, or an option is out of range.
    """
    if kd_weight == 0:
        teacher = None
    _check_options(kd_weight, ce_weight, temperature, kind, chunk_tokens, num_items)
    _check_shapes(student_logits, teacher, labels)
    options = _Options(kd_weight, ce_weight, temperature, kind == "reverse_kl", chunk_tokens)
    count = (labels != IGNORE_INDEX).sum().clamp(min=1) if num_items is None else num_items
    if torch.is_grad_enabled() and student_logits.requires_grad:
        return DistillationLoss(*_Distillation.apply(student_logits, teacher, labels, options, count, inplace))
    with torch.no_grad():
        return DistillationLoss(*_loss(student_logits, teacher, labels, options, count, overwrite=False))


def square_head(
    student_hidden: Sequence[Tensor],
    teacher_hidden: Sequence[Tensor],
    eps: float = 1e-6,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Return the sum over blocks of MSE(h_s, h_t) / (mean(h_t^2) + eps) (SquareHead, arXiv 2310.06927, section 3).

    Args:
        student_hidden: output of each block, [..., d]; gradient flows to these alone.
        teacher_hidden: the same of the teacher.
        eps: against a teacher block of zeros.
        attention_mask: [...], 0 where a token is padding and counts for nothing; None where all count.
    Raises:
        ValueError: the two differ in the number of blocks or in shapes.
    """
    shapes = [tuple(h.shape) for h in student_hidden], [tuple(h.shape) for h in teacher_hidden]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"student_hidden is {shapes[0]}, teacher_hidden {shapes[1]}: pass the same blocks of both")
    total = student_hidden[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_hidden, teacher_hidden, strict=True):
        target = teacher.detach().float()
        distance, size = (student.float() - target).square().mean(-1), target.square().mean(-1)
        if attention_mask is None:
            total = total + distance.mean() / (size.mean() + eps)
        else:
            weight = attention_mask.float() / attention_mask.sum().clamp(min=1)
            total = total + (distance * weight).sum() / ((size * weight).sum() + eps)
    return total


@dataclass(frozen=True)
class _Options:
    kd_weight: float
    ce_weight: float
    temperature: float
    reverse: bool
    chunk_tokens: int


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        teacher: TeacherOutput | None,
        labels: Tensor,
        options: _Options,
        count: int | Tensor,
        inplace: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradient = logits if inplace else logits.clone(memory_format=torch.contiguous_format)
        losses = _loss(gradient, teacher, labels, options, count, overwrite=True)
        ctx.save_for_backward(gradient)
        ctx.count, ctx.chunk_tokens = count, options.chunk_tokens
        ctx.mark_non_differentiable(*losses[1:])
        return losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # In place: autograd refuses a second pass over the same graph, since what was saved has changed.
        (gradient,) = ctx.saved_tensors
        scale = (grad_total.to(_accumulator(gradient)) / ctx.count).view(1)  # not 0-dim, which would be rounded first
        for rows, _none, _labels in _chunks(gradient, None, None, ctx.chunk_tokens):
            torch.mul(rows, scale, out=rows)
        return gradient, None, None, None, None, None


def _loss(
    logits: Tensor,
    teacher: TeacherOutput | None,
    labels: Tensor,
    options: _Options,
    count: int | Tensor,
    overwrite: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (total, ce, kd); with `overwrite`, `logits` become the gradient of count * total."""
    ce = kd = torch.zeros((), dtype=_accumulator(logits), device=logits.device)
    for rows, teacher_rows, row_labels in _chunks(logits, teacher, labels, options.chunk_tokens):
        losses = _chunk_loss(rows, teacher_rows, row_labels, options, overwrite)
        ce, kd = ce + losses[0].sum(), kd + losses[1].sum()
    ce, kd = ce / count, kd / count
    return options.kd_weight * kd + options.ce_weight * ce, ce, kd


def _chunk_loss(
    logits: Tensor, teacher: TeacherOutput | None, labels: Tensor, options: _Options, overwrite: bool
) -> tuple[Tensor, Tensor]:
    if isinstance(teacher, TopK):
        return _top_k_loss(logits, teacher, labels, options, overwrite)
    teacher_logits = teacher.head(teacher.hidden) if isinstance(teacher, Head) else teacher
    if teacher_logits is not None:
        _check_vocabulary(logits, teacher_logits.shape[-1])
    return _kernel(logits, teacher_logits)(
        logits,
        teacher_logits,
        labels,
        kd_weight=options.kd_weight,
        ce_weight=options.ce_weight,
        temperature=options.temperature,
        reverse=options.reverse,
        overwrite=overwrite,
    )


def _kernel(logits: Tensor, teacher_logits: Tensor | None) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the fused kernel where it runs, else the same in torch."""
    if logits.is_cuda and target.why_not(logits.device) is None:
        from sparsekit_kernels.kd_loss import kd_loss, why_not_logits

        if why_not_logits(logits, teacher_logits) is None:
            return kd_loss
    return kd_loss_reference


def _top_k_loss(
    logits: Tensor, teacher: TopK, labels: Tensor, options: _Options, overwrite: bool
) -> tuple[Tensor, Tensor]:
    """`kd_loss_reference` over k + 1 classes: the teacher's likeliest tokens, and all others as one.

    The logit of that bucket is the logsumexp z_r of its tokens, whose derivatives are exp(z_j - z_r).
    """
    z = logits.to(_accumulator(logits))
    ce, gradient = cross_entropy(z, labels)
    gradient *= options.ce_weight
    rest = z / options.temperature
    ids, log_q = teacher.ids.long(), teacher.log_probs.to(z.dtype)
    log_p = rest.gather(1, ids)
    has_rest = ids.shape[1] < z.shape[1]
    if has_rest:
        rest.scatter_(1, ids, -math.inf)
        bucket = torch.logsumexp(rest, dim=1, keepdim=True)
        mass = (1 - log_q.exp().sum(1, keepdim=True)).clamp(min=torch.finfo(torch.float32).eps)
        log_p, log_q = torch.cat((log_p, bucket), 1), torch.cat((log_q, mass.log()), 1)
    kl, by_class = divergence(torch.log_softmax(log_p, 1), torch.log_softmax(log_q, 1), options.reverse)
    if overwrite:
        by_class *= options.kd_weight * options.temperature
        if has_rest:
            gradient += (rest - bucket).exp_() * by_class[:, -1:]
        gradient.scatter_add_(1, ids, by_class[:, : ids.shape[1]])
        logits.copy_(gradient.masked_fill_((labels == IGNORE_INDEX)[:, None], 0))
    return ce, (options.temperature**2 * kl).masked_fill(labels == IGNORE_INDEX, 0)


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _chunks(
    logits: Tensor, teacher: TeacherOutput | None, labels: Tensor | None, chunk_tokens: int
) -> Iterator[tuple[Tensor, Any, Any]]:
    """Yield views of at most `chunk_tokens` rows [m, V] of the logits, with what belongs to them."""
    if not all(_is_flat(x) for x in (logits, teacher) if isinstance(x, Tensor)):  # flattening would copy
        for i in range(len(logits)):
            yield from _chunks(logits[i], _part(teacher, i), _part(labels, i), chunk_tokens)
        return
    rows, teacher = logits.view(-1, logits.shape[-1]), _flatten(teacher)
    labels = None if labels is None else labels.reshape(-1)
    for start in range(0, len(rows), chunk_tokens):
        here = slice(start, start + chunk_tokens)
        yield rows[here], _part(teacher, here), _part(labels, here)


def _is_flat(x: Tensor) -> bool:
    """Whether x [..., V] is a view of rows [-1, V]."""
    return all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.dim() - 2))


def _flatten(teacher: TeacherOutput | None) -> TeacherOutput | None:
    match teacher:
        case Head(hidden, head):
            return Head(hidden.reshape(-1, hidden.shape[-1]), head)
        case TopK(ids, log_probs):
            return TopK(ids.reshape(-1, ids.shape[-1]), log_probs.reshape(-1, ids.shape[-1]))
        case Tensor():
            return teacher.view(-1, teacher.shape[-1])
    return None


def _part(teacher: Any, index: int | slice) -> Any:
    """The tokens at `index` of the first dimension."""
    match teacher:
        case Head(hidden, head):
            return Head(hidden[index], head)
        case TopK(ids, log_probs):
            return TopK(ids[index], log_probs[index])
        case Tensor():
            return teacher[index]
    return None


def _check_options(
    kd_weight: float,
    ce_weight: float,
    temperature: float,
    kind: str,
    chunk_tokens: int,
    num_items: int | Tensor | None,
) -> None:
    for name, weight in (("kd_weight", kd_weight), ("ce_weight", ce_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{name}={weight} must be a number of at least 0, as 0.5")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be above 0, as 2.0")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} must be one of {', '.join(KINDS)}")
    if not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens!r} must be a whole number of tokens, as 1024")
    if isinstance(num_items, int | float) and not num_items > 0:
        raise ValueError(f"num_items={num_items} must be above 0: the tokens of the whole step, or None")


def _check_shapes(logits: Tensor, teacher: TeacherOutput | None, labels: Tensor) -> None:
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(labels.shape)}, student_logits {tuple(logits.shape)}: one label per token is needed"
        )
    _check_ids("labels", labels.where(labels != IGNORE_INDEX, 0), logits)
    match teacher:
        case Head(hidden, head):
            rows = hidden
            vocabulary = getattr(head, "out_features", None)
        case TopK(ids, log_probs):
            if ids.shape != log_probs.shape:
                raise ValueError(f"ids are {tuple(ids.shape)}, log_probs {tuple(log_probs.shape)}: they must be alike")
            if ids.shape[-1] > logits.shape[-1]:
                _check_vocabulary(logits, ids.shape[-1])
            _check_ids("the teacher's ids", ids, logits)
            rows, vocabulary = ids, None
        case Tensor():
            rows, vocabulary = teacher, teacher.shape[-1]
        case None:
            return
        case _:
            raise ValueError(f"teacher is {type(teacher).__name__}: pass logits, Head, TopK or None")
    if vocabulary is not None:
        _check_vocabulary(logits, vocabulary)
    if rows.shape[:-1] != labels.shape:
        raise ValueError(f"the teacher has {tuple(rows.shape[:-1])} tokens, the student {tuple(labels.shape)}")


def _check_ids(name: str, ids: Tensor, logits: Tensor) -> None:
    if ids.device.type != "cpu" or not ids.numel():  # a look would make the host wait for a GPU; indexing fails there
        return
    low, high = (int(x) for x in ids.aminmax())
    if low < 0 or high >= logits.shape[-1]:
        raise ValueError(
            f"{name} go from {low} to {high}, the vocabulary has {logits.shape[-1]} tokens: they must be below that"
            + (f", or {IGNORE_INDEX} to be ignored" if name == "labels" else "")
        )


def _check_vocabulary(logits: Tensor, vocabulary: int) -> None:
    if vocabulary != logits.shape[-1]:
        raise ValueError(
            f"the teacher's vocabulary has {vocabulary} tokens, the student's {logits.shape[-1]}: "
            "distillation needs a teacher with the same tokenizer"
        )
