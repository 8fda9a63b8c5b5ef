"""N:M masks that are drawn, so that gradients reach the choice (MaskLLM, arXiv 2409.17481).

Each group of M consecutive inputs of a row has one logit pi_c for each of its candidates M_c, the C(M, N) ways to keep
N of M: six for 2:4. A forward in training mode multiplies the frozen weight by a soft mask,

    y = softmax((kappa pi + g) / tau),   g ~ Gumbel(0, 1),   mask = sum_c y_c M_c,   out = x @ (mask * W).T

which tends to a draw from softmax(kappa pi) as tau falls; one in eval mode takes the likeliest candidate.

Memory. Logits take C(M, N) / M fp32 numbers a weight, 1.5 for 2:4, and as much again each for their gradient and Adam's
two moments: 24 bytes a weight beside the frozen one. Nothing of that size is kept between forward and backward: the
noise is made of a seed that both know, and the backward pass makes y and mask once more. So gradient checkpointing,
which runs a forward twice, sees the same noise as well.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsekit.patterns import NM
from sparsekit.targets import is_conv1d

MAX_CANDIDATES = 128
"""So many logits a group, at most; 4:8 has 70."""


@dataclass
class Draw:
    """What a training forward samples with; one for all layers, set before each forward.

    Attributes:
        kappa: factor of the logits; the larger, the less often is another than the likeliest drawn.
        tau: temperature of the softmax; the smaller, the nearer to 0 and 1 are masks.
        key: whole numbers that name this forward: the same key, the same noise.
        keeps_energy: whether layers keep their energy, with its graph. Not where a forward is repeated in the backward
            (gradient checkpointing): nobody would take it, and all that it hangs on would stay in memory.
    """

    kappa: float = 1.0
    tau: float = 1.0
    key: tuple[int, ...] = (0,)
    keeps_energy: bool = False

    def seed(self, layer: int) -> int:
        """Return the seed of one layer's noise, unlike that of any other layer or key."""
        return int(np.random.SeedSequence([*self.key, layer]).generate_state(1, np.uint64)[0])


def num_candidates(pattern: NM) -> int:
    """Return C(M, N), the number of ways to keep N of M."""
    return math.comb(pattern.m, pattern.n)


def candidates(pattern: NM) -> Tensor:
    """Return every way to keep N of M as boolean [C, M], in the order 1100, 1010, 1001, 0110, 0101, 0011.

    Raises:
        ValueError: there are more than `MAX_CANDIDATES`.
    """
    count = num_candidates(pattern)
    if count > MAX_CANDIDATES:
        raise ValueError(
            f"pattern={str(pattern)!r} has {count} masks a group, and each needs a logit: at most {MAX_CANDIDATES} are "
            "possible, use '2:4' (6), '1:4' (4), '2:8' (28) or '4:8' (70)"
        )
    table = torch.zeros(count, pattern.m, dtype=torch.bool)
    for row, kept in enumerate(itertools.combinations(range(pattern.m), pattern.n)):
        table[row, list(kept)] = True
    return table


def possible(pattern: NM, length: int) -> Tensor:
    """Return which candidates a group of `length` <= M entries can take, boolean [C]: those that keep min(N, length)
    of its own."""
    return candidates(pattern)[:, :length].sum(dim=1) == min(pattern.n, length)


def initial_logits(prior_keep: Tensor, pattern: NM, *, lean: float, std: float, generator: torch.Generator) -> Tensor:
    """Return logits fp32 [N, ceil(K / M), C] that lean to a mask.

    pi_c = (sim_c - N^2 / M) * lean + N(0, std^2), sim_c the number of entries that candidate and prior mask both keep,
    N^2 / M its mean over candidates (1 for 2:4). What a shorter last group cannot take has -inf.

    Args:
        prior_keep: boolean [N, K] that obeys the pattern.
        lean: how far a candidate stands above one that has one entry less in common with the prior.
        std: of the noise.
        generator: of the noise.
    """
    rows, K = prior_keep.shape
    table = candidates(pattern).to(prior_keep.device, torch.float32)
    groups = _groups(prior_keep.float(), pattern.m)
    noise = torch.randn(*groups.shape[:2], len(table), generator=generator, device=generator.device)
    overlap = groups @ table.T - pattern.n**2 / pattern.m
    logits = noise.to(prior_keep.device).mul_(std).add_(overlap, alpha=lean)
    if rest := K % pattern.m:
        logits[:, -1, ~possible(pattern, rest).to(logits.device)] = -torch.inf
    return logits


def gumbel_noise(shape: torch.Size, seed: int, device: torch.device) -> Tensor:
    """Return standard Gumbel noise, fp32; the same seed gives the same on the same kind of device."""
    generator = torch.Generator(device).manual_seed(seed)
    exponential = torch.empty(shape, device=device).exponential_(generator=generator)
    # A draw of exactly 0 would be infinite noise, and two of them in a group NaN.
    return exponential.clamp_(min=torch.finfo(torch.float32).tiny).log_().neg_()


def soft_choice(logits: Tensor, kappa: float, tau: float, seed: int) -> Tensor:
    """Return y [N, G, C], rows that sum to 1."""
    noise = gumbel_noise(logits.shape, seed, logits.device)
    return torch.softmax(noise.add_(logits, alpha=kappa).div_(tau), dim=-1)


def soft_mask(choice: Tensor, table: Tensor, K: int) -> Tensor:
    """Return sum_c y_c M_c as [N, K]; `table` is [C, M] of the dtype of `choice` [N, G, C]."""
    return (choice @ table).flatten(1)[:, :K]


class _SoftlyMaskedLinear(torch.autograd.Function):
    """(x, pi) -> (x @ (mask * W).T + bias, sum (mask * W)^2); keeps x alone for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        logits: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        table: Tensor,
        kappa: float,
        tau: float,
        seed: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, logits, weight, table)
        ctx.sampling = kappa, tau, seed
        with torch.autocast(x.device.type, enabled=False):
            mask = soft_mask(soft_choice(logits, kappa, tau, seed), table, weight.shape[1])
            masked = mask.mul_(weight)
            out = F.linear(x, masked.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return out, masked.square_().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, weight, table = ctx.saved_tensors
        kappa, tau, seed = ctx.sampling
        choice = soft_choice(logits, kappa, tau, seed)
        masked = soft_mask(choice, table, weight.shape[1]).mul_(weight)
        grad_x = grad_out @ masked.to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, *[None] * 7
        grad_masked = (grad_out.reshape(-1, len(weight)).T @ x.reshape(-1, x.shape[-1])).float()
        grad_mask = grad_masked.add_(masked.mul_(2 * grad_energy)).mul_(weight)
        grad_choice = _groups(grad_mask, table.shape[1]) @ table.T
        mean = (choice * grad_choice).sum(dim=-1, keepdim=True)
        return grad_x, grad_choice.sub_(mean).mul_(choice).mul_(kappa / tau), *[None] * 6


class DrawnMaskLinear(nn.Linear):
    """A linear layer with a frozen weight and a mask that is learnt; it shares both with the layer it stands for.

    Attributes:
        mask_logits: parameter, fp32 [N, ceil(K / M), C].
        energy: sum (mask * W)^2 of the last training forward, with gradient, where the draw keeps it; read it with
            `take_energy`.
    """

    mask_logits: nn.Parameter
    table: Tensor

    def __init__(self, layer: nn.Module, logits: Tensor, pattern: NM, draw: Draw, index: int) -> None:
        """Build from an `nn.Linear` or a `Conv1D`, whose weight is then seen transposed.

        Args:
            logits: see `initial_logits`.
            draw: shared with all layers, and set before each forward.
            index: number of the layer, so that each has noise of its own.
        """
        weight = layer.get_parameter("weight")
        N, K = weight.T.shape if is_conv1d(layer) else weight.shape
        super().__init__(K, N, bias=False, device="meta")
        self.weight = nn.Parameter(weight.detach().T, requires_grad=False) if is_conv1d(layer) else weight
        self.register_parameter("bias", layer._parameters["bias"])
        self.mask_logits = nn.Parameter(logits.to(weight.device))
        self.register_buffer("table", candidates(pattern).to(weight.device, torch.float32), persistent=False)
        self.pattern, self.draw, self.index = pattern, draw, index
        self.energy: Tensor | None = None
        self.train(layer.training)

    @torch.compiler.disable  # a seed of its own for each call would mean a compilation for each
    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return F.linear(input, self.weight.masked_fill(~self.keep(), 0), self.bias)
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        draw = self.draw
        out, energy = _SoftlyMaskedLinear.apply(
            input.to(dtype),
            self.mask_logits,
            self.weight,
            self.bias,
            self.table,
            draw.kappa,
            draw.tau,
            draw.seed(self.index),
        )
        self.energy = energy if draw.keeps_energy else None
        return out

    def take_energy(self) -> Tensor | None:
        """Return the energy of the last training forward, once; None where there was none."""
        energy, self.energy = self.energy, None
        return energy

    @torch.no_grad()
    def keep(self) -> Tensor:
        """Return the mask of the likeliest candidates, boolean [N, K]."""
        return self.table.bool()[self.mask_logits.argmax(dim=-1)].flatten(1)[:, : self.in_features]

    @torch.no_grad()
    def confidence(self, kappa: float) -> Tensor:
        """Return the probability of the likeliest candidate of each group, [N, ceil(K / M)]."""
        return torch.softmax(kappa * self.mask_logits, dim=-1).amax(dim=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={self.pattern}"


def _groups(x_NK: Tensor, m: int) -> Tensor:
    """Return [N, ceil(K / m), m], the last group filled up with zeros."""
    return F.pad(x_NK, (0, -x_NK.shape[1] % m)).unflatten(1, (-(-x_NK.shape[1] // m), m))
