"""Distillation loss and its gradient, which takes the place of the student's logits: no copy of them is ever made.

For each token, with student logits z and teacher logits t [V], temperature T, p = softmax(z / T), q = softmax(t / T):

    ce = -log softmax(z)[label]        kd = T^2 KL(q || p), or T^2 KL(p || q) with `reverse`

    z <- ce_weight * (softmax(z) - onehot(label)) + kd_weight * T * (p - q)
         with `reverse`, the last factor is p_j (log p_j - log q_j - KL)

A block has one token and reads its logits twice. The first time it keeps running maxima of z and t, and the sums that
belong to them (online softmax), of exp(z), exp(z / T), exp(t / T) and of the differences t - z weighed by the
distribution in front, since

    KL(q || p) = sum_j q_j (t_j - z_j) / T - logsumexp(t / T) + logsumexp(z / T)

A student equal to its teacher has thus exactly the loss and the gradient 0. The second time it writes the gradient. So
10 bytes move per logit at 16 bits (8 for z and t, 2 for the gradient), where plain torch moves several times that in
float32. `reference.kd_loss_reference` is the same in torch. Not yet measured.
"""

# What Triton compiles takes Triton's values, which have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsekit_kernels.reference import IGNORE_INDEX
from sparsekit_kernels.target import why_not

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MOST_AT_ONCE = 2048  # logits that a block holds: 8 a thread of 8 warps, with about 100 registers each (sm_90 SASS)

_IGNORE_INDEX = tl.constexpr(IGNORE_INDEX)
_LOWEST = tl.constexpr(-3.0e38)  # below every logit, and finite: what is -inf stays -inf when it is subtracted


@triton.jit
def _load(ptr, start, V: tl.constexpr, BLOCK: tl.constexpr):
    """Logits start .. start + BLOCK of a row in float32, -inf beyond its end."""
    i = start + tl.arange(0, BLOCK)
    return tl.load(ptr + i, mask=i < V, other=-float("inf")).to(tl.float32)


@triton.jit
def _kd_loss_kernel(
    z_ptr, t_ptr, labels_ptr, ce_ptr, kd_ptr, stride_zm, stride_tm, temperature, kd_weight, ce_weight,
    V: tl.constexpr, HAS_TEACHER: tl.constexpr, REVERSE: tl.constexpr, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64)
    z_ptr += m * stride_zm
    t_ptr += m * stride_tm
    i = tl.arange(0, BLOCK)
    label = tl.load(labels_ptr + m)
    if label == _IGNORE_INDEX:
        tl.store(ce_ptr + m, 0.0)
        tl.store(kd_ptr + m, 0.0)
        if OVERWRITE:
            for start in range(0, V, BLOCK):
                zero = tl.zeros((BLOCK,), tl.float32).to(z_ptr.dtype.element_ty)
                tl.store(z_ptr + start + i, zero, mask=start + i < V)
        return

    cold = 1.0 / temperature
    z_max = tl.full((), _LOWEST, tl.float32)
    t_max = tl.full((), _LOWEST, tl.float32)
    exp_z = tl.zeros((BLOCK,), tl.float32)  # sums at temperature 1
    exp_z_T = tl.zeros((BLOCK,), tl.float32)  # and at T
    exp_t_T = tl.zeros((BLOCK,), tl.float32)
    gap = tl.zeros((BLOCK,), tl.float32)
    chosen = tl.zeros((BLOCK,), tl.float32)  # the logit of the label
    for start in range(0, V, BLOCK):
        z = _load(z_ptr, start, V, BLOCK)
        highest = tl.maximum(z_max, tl.max(z, axis=0))
        exp_z = exp_z * tl.exp(z_max - highest) + tl.exp(z - highest)
        chosen += tl.where(start + i == label, z, 0.0)
        if HAS_TEACHER:
            rescale_z = tl.exp((z_max - highest) * cold)
            e_z = tl.exp((z - highest) * cold)
            exp_z_T = exp_z_T * rescale_z + e_z
            t = _load(t_ptr, start, V, BLOCK)
            highest_t = tl.maximum(t_max, tl.max(t, axis=0))
            rescale_t = tl.exp((t_max - highest_t) * cold)
            e_t = tl.exp((t - highest_t) * cold)
            exp_t_T = exp_t_T * rescale_t + e_t
            # What has no mass in front counts for nothing, even where a logit is -inf.
            if REVERSE:
                gap = gap * rescale_z + tl.where(e_z > 0, e_z * (z - t), 0.0)
            else:
                gap = gap * rescale_t + tl.where(e_t > 0, e_t * (t - z), 0.0)
            t_max = highest_t
        z_max = highest

    # Logarithms of the sums stay apart from the maxima, which may be so large that they would round them off.
    log_z = tl.log(tl.sum(exp_z, axis=0))
    is_token = (label >= 0) & (label < V)
    tl.store(ce_ptr + m, tl.where(is_token, z_max - tl.sum(chosen, axis=0) + log_z, float("nan")))
    log_z_T = 0.0
    log_t_T = 0.0
    apart = 0.0
    kl = 0.0
    if HAS_TEACHER:
        sum_z = tl.sum(exp_z_T, axis=0)
        sum_t = tl.sum(exp_t_T, axis=0)
        log_z_T = tl.log(sum_z)
        log_t_T = tl.log(sum_t)
        apart = (t_max - z_max) * cold + (log_t_T - log_z_T)  # logsumexp(t / T) - logsumexp(z / T)
        if REVERSE:
            kl = tl.sum(gap, axis=0) / sum_z * cold + apart
        else:
            kl = tl.sum(gap, axis=0) / sum_t * cold - apart
    tl.store(kd_ptr + m, kl * temperature * temperature)

    if OVERWRITE:
        for start in range(0, V, BLOCK):
            z = _load(z_ptr, start, V, BLOCK)
            gradient = ce_weight * (tl.exp(z - z_max - log_z) - tl.where(start + i == label, 1.0, 0.0))
            if HAS_TEACHER:
                t = _load(t_ptr, start, V, BLOCK)
                p = tl.exp((z - z_max) * cold - log_z_T)
                if REVERSE:
                    by_z = tl.where(p > 0, p * ((z - t) * cold + apart - kl), 0.0)
                else:
                    by_z = p - tl.exp((t - t_max) * cold - log_t_T)
                gradient += kd_weight * temperature * by_z
            tl.store(z_ptr + start + i, gradient.to(z_ptr.dtype.element_ty), mask=start + i < V)


def kd_loss(
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
    """Return (ce, kd), both float32 [M], and leave the gradient in `logits`; see `reference.kd_loss_reference`.

    Args:
        logits: [M, V] bf16, fp16 or fp32; rows may be strided. Overwritten, with `overwrite`.
        teacher_logits: [M, V], likewise, in any of these dtypes; or None.
        labels: [M] integers. One that is neither -100 nor in [0, V) makes its ce NaN.
    Raises:
        ValueError: shapes, dtypes or strides do not fit.
        RuntimeError: Triton cannot run on the device of `logits`; the message says why.
    """
    reason = why_not(logits.device) or why_not_logits(logits, teacher_logits)
    if reason is not None:
        raise (RuntimeError if why_not(logits.device) else ValueError)(f"kd_loss cannot run here: {reason}")
    M, V = logits.shape
    if labels.shape != (M,) or labels.is_floating_point():
        raise ValueError(f"labels are {labels.dtype} {tuple(labels.shape)}: expected {M} integers")
    ce = torch.empty(M, dtype=torch.float32, device=logits.device)
    kd = torch.empty(M, dtype=torch.float32, device=logits.device)
    if M == 0:
        return ce, kd
    block = min(triton.next_power_of_2(V), MOST_AT_ONCE)
    teacher = logits if teacher_logits is None else teacher_logits
    with torch.cuda.device_of(logits):
        _kd_loss_kernel[(M,)](
            logits, teacher, labels.contiguous(), ce, kd, logits.stride(0), teacher.stride(0),
            float(temperature), float(kd_weight), float(ce_weight),
            V=V, HAS_TEACHER=teacher_logits is not None, REVERSE=reverse, OVERWRITE=overwrite, BLOCK=block,
            num_warps=max(block // 256, 1),
        )  # fmt: skip
    return ce, kd


def why_not_logits(logits: Tensor, teacher_logits: Tensor | None) -> str | None:
    """Return None if the kernel takes these logits, else the reason."""
    for name, x in (("logits", logits), ("teacher_logits", teacher_logits)):
        if x is None:
            continue
        if x.dtype not in DTYPES:
            return f"{name} are {x.dtype}, it takes {', '.join(map(str, DTYPES))}"
        if x.dim() != 2 or x.shape != logits.shape or x.shape[1] == 0:
            return f"{name} are {tuple(x.shape)}, it takes [M, V] with V > 0, the same of student and teacher"
        if x.stride(1) != 1 and x.shape[1] > 1:
            return f"{name} have strides {x.stride()}, it takes rows of neighbours"
        if x.device != logits.device:
            return f"{name} are on {x.device}, the student's on {logits.device}"
    return None
