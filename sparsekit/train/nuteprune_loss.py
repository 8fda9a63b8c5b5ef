"""The loss of NutePrune: the student under its drawn gates against a teacher that is the same model less pruned.

    L = kd_weight T^2 KL(teacher || student) + ce_weight CE + hidden_weight D

The KL is a mean over tokens. The published code sums it over the tokens of a sequence, and D over blocks, so that the
terms depend on the length of a sequence and on the size of hidden states (`kd_reduction`, `hidden_loss`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekit.train.data import IGNORED
from sparsekit.train.distill import TeacherOutput, distillation_loss, square_head
from sparsekit.train.nuteprune_config import NutePruneConfig


def student_loss(
    args: NutePruneConfig,
    outputs: Any,
    taught: TeacherOutput | None,
    taught_hidden: Sequence[Tensor],
    labels: Tensor,
    attention_mask: Tensor | None,
    num_items: Any = None,
    learns: bool = True,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, and its parts as means over this batch's tokens.

    Args:
        outputs: of the student; its logits are overwritten where a gradient is wanted.
        taught: what the teacher says; None for the cross entropy alone.
        taught_hidden: embedding and output of each block of the teacher, where these are to be matched.
        labels: shifted.
        num_items: tokens of the whole step, of which these are a share.
        learns: False for the cross entropy alone, as in evaluation.
    """
    num_here = (labels != IGNORED).sum().clamp(min=1)
    kd_weight = args.kd_weight if taught is not None else 0.0
    if args.kd_reduction == "sequences":
        kd_weight *= float(num_here) / len(labels)
    loss = distillation_loss(
        outputs.logits,
        taught,
        labels,
        kd_weight=kd_weight,
        ce_weight=args.ce_weight if learns else 1.0,
        temperature=args.temperature,
        kind=args.kd_kind,
        num_items=num_items,
    )
    share = 1.0 if num_items is None else num_here / num_items
    total, parts = loss.total, {"ce_loss": loss.ce / share}
    if taught is not None:
        parts["kd_loss"] = loss.kd / share
    if taught_hidden:
        student = outputs.hidden_states[1:]
        if args.hidden_loss == "paper":
            parts["hidden_loss"] = nonzero_square(student, taught_hidden[1:], attention_mask)
        else:
            parts["hidden_loss"] = square_head(student, taught_hidden[1:], attention_mask=attention_mask) / len(student)
        total = total + args.hidden_weight * parts["hidden_loss"] * share
    return total, parts


def nonzero_square(
    student_hidden: Sequence[Tensor], teacher_hidden: Sequence[Tensor], attention_mask: Tensor | None = None
) -> Tensor:
    """Return the sum over blocks of the mean square of h_s - h_t, fp32, over entries where h_s is not zero.

    Args:
        student_hidden: output of each block, [..., d]; gradient flows to these alone.
        teacher_hidden: the same of the teacher.
        attention_mask: [...], 0 where a token is padding and counts for nothing; None where all count.
    """
    total = student_hidden[0].new_zeros((), dtype=torch.float32)
    for student, teacher in zip(student_hidden, teacher_hidden, strict=True):
        there = student.detach() != 0
        if attention_mask is not None:
            there &= attention_mask.bool()[..., None]
        square = (student.float() - teacher.detach().float()).square()
        total = total + square.masked_fill(~there, 0).sum() / there.sum().clamp(min=1)
    return total
