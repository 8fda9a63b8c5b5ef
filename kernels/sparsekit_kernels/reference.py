"""Plain torch versions of what kernels compute, for any device: the truth that they are compared with.

Importing this module imports no Triton.
"""

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""The label of a token that counts for nothing, as in `torch.nn.functional.cross_entropy`."""


def kd_loss_reference(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    kd_weight: float,
    ce_weight: float,
    temperature: float,
    reverse: bool = False,
    overwrite: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return (ce, kd), both [M], of each token, and leave the gradient of their weighted sum in `logits`.

    ce = -log softmax(logits)[label]; kd = T^2 KL(q || p) with q = softmax(teacher_logits / T) and
    p = softmax(logits / T) (Hinton et al., arXiv 1503.02531: T^2 keeps the size of the gradient), or T^2 KL(p || q)
    with `reverse`. A row whose label is -100 has ce = kd = 0 and a gradient of zero.

    Args:
        logits: [M, V], any floating dtype. With `overwrite` it holds, afterwards, the gradient of
            sum_m (kd_weight * kd_m + ce_weight * ce_m), rounded from float32.
        teacher_logits: [M, V], or None for kd = 0.
        labels: [M] integers in [0, V), or -100.
    Returns:
        float32 (float64 for float64 logits).
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ce, gradient = cross_entropy(z, labels)
    gradient *= ce_weight
    kd = torch.zeros_like(ce)
    if teacher_logits is not None:
        log_p = torch.log_softmax(z / temperature, dim=-1)
        log_q = torch.log_softmax(teacher_logits.to(z.dtype) / temperature, dim=-1)
        kl, by_logits = divergence(log_p, log_q, reverse)
        kd = (temperature**2 * kl).masked_fill(labels == IGNORE_INDEX, 0)
        gradient += kd_weight * temperature * by_logits
    if overwrite:
        logits.copy_(gradient.masked_fill_((labels == IGNORE_INDEX)[:, None], 0))
    return ce, kd


def cross_entropy(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (-log softmax(z)[label] [M], 0 where ignored; its gradient by z [M, V], ignored rows undefined)."""
    ignored = labels == IGNORE_INDEX
    target = labels.masked_fill(ignored, 0)[:, None]
    log_p = torch.log_softmax(z, dim=-1)
    ce = -log_p.gather(1, target)[:, 0]
    gradient = log_p.exp_()
    gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1))
    return ce.masked_fill(ignored, 0), gradient


def divergence(log_p: Tensor, log_q: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Return KL(q || p) [M] and its gradient by the logits of p [M, V]; KL(p || q) with `reverse`.

    0 log 0 counts as 0, so a class may be impossible (log -inf) where the distribution in front has no mass.
    """
    p = log_p.exp()
    if not reverse:
        q = log_q.exp()
        return torch.where(q > 0, q * (log_q - log_p), q).sum(-1), p - q
    terms = torch.where(p > 0, p * (log_p - log_q), p)
    kl = terms.sum(-1)
    return kl, terms - p * kl[:, None]
