"""What a reader is fed and what it is to give for it, summed over tokens: all that any recovery has to know."""

from dataclasses import dataclass

import torch
from torch import Tensor


class Moments:
    """Sums over tokens of the inputs a [K] of a reader and of the targets t [N] of its outputs.

    Attributes:
        weight: sum of the weights of the tokens; their number, where they have none.
        inputs: sum of a, [K].
        gram: sum of a aᵀ, [K, K].
        targets: sum of t, [N].
        cross: sum of t aᵀ, [N, K].
        power: sum of |t|².
    """

    def __init__(
        self, in_features: int, out_features: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        self.weight = 0.0
        self.inputs = torch.zeros(in_features, dtype=dtype, device=device)
        self.gram = torch.zeros(in_features, in_features, dtype=dtype, device=device)
        self.targets = torch.zeros(out_features, dtype=dtype, device=device)
        self.cross = torch.zeros(out_features, in_features, dtype=dtype, device=device)
        self.power = 0.0

    def add(self, a_MK: Tensor, t_MN: Tensor, weights_M: Tensor | None = None) -> None:
        """Take in M tokens, each as often as its weight says, if it has one."""
        a, t = a_MK.to(self.gram.dtype), t_MN.to(self.gram.dtype)
        weighted = a if weights_M is None else a * weights_M.to(a)[:, None]
        counts = t.new_ones(len(t)) if weights_M is None else weights_M.to(t)
        self.weight += float(counts.sum())
        self.inputs += weighted.sum(dim=0)
        self.gram.addmm_(weighted.T, a)
        self.targets += counts @ t
        self.cross.addmm_(t.T, weighted)
        self.power += float(counts.double() @ t.double().square().sum(dim=1))

    def add_inputs(self, a_MK: Tensor) -> None:
        """Take in M tokens without targets; `aim_at_` gives them all theirs."""
        a = a_MK.to(self.gram.dtype)
        self.weight += len(a)
        self.inputs += a.sum(dim=0)
        self.gram.addmm_(a.T, a)

    def aim_at_(self, w_NK: Tensor, bias: Tensor | None) -> None:
        """Make what this reader gives the targets."""
        w = w_NK.to(self.gram)
        b = w.new_zeros(len(w)) if bias is None else bias.to(self.gram)
        along = w @ self.inputs
        self.cross = torch.addr(w @ self.gram, b, self.inputs)
        self.targets = along + self.weight * b
        own = ((w.double() @ self.gram.double()) * w.double()).sum() + 2 * (along.double() @ b.double())
        self.power = float(own) + self.weight * float(b.double().square().sum())

    def is_finite(self) -> bool:
        """Return whether no NaN or infinity came in."""
        return bool(self.gram.diagonal().isfinite().all() and self.targets.isfinite().all())

    def error(self, w_NK: Tensor, bias: Tensor | None) -> float:
        """Return the mean over tokens of |t - W a - b|²."""
        w = w_NK.double()
        b = w.new_zeros(len(w)) if bias is None else bias.double()
        fitted = float((w * self.cross.double()).sum() + b @ self.targets.double())
        own = float(((w @ self.gram.double()) * w).sum() + 2 * b @ (w @ self.inputs.double()))
        return (self.power - 2 * fitted + own) / self.weight + float(b @ b)

    def normal_equations(self, bias: Tensor | None, intercept: bool) -> "NormalEquations":
        """Return the equations for W alone.

        Args:
            bias: of the reader, [N]; it stays as it is where there is no intercept.
            intercept: whether W is to be fitted together with a bias, which then leaves the equations: they are those
                of the inputs and targets less their means.
        """
        dtype = torch.float64 if self.gram.device.type == "cpu" else torch.float32
        mean_a, mean_t = self.inputs.to(dtype) / self.weight, self.targets.to(dtype) / self.weight
        H, C = self.gram.to(dtype) / self.weight, self.cross.to(dtype) / self.weight
        if intercept:
            return NormalEquations(H.addr_(mean_a, mean_a, alpha=-1), C.addr_(mean_t, mean_a, alpha=-1), mean_a, mean_t)
        if bias is not None:
            C.addr_(bias.to(dtype), mean_a, alpha=-1)
        return NormalEquations(H, C)


@dataclass
class NormalEquations:
    """W H = C, in float64 on the CPU and float32 elsewhere.

    Attributes:
        H: mean of a aᵀ, [K, K].
        C: mean of t aᵀ, [N, K].
        mean_inputs, mean_targets: what makes the bias out of W, where there is an intercept.
        strength: λ of the ridge in it.
    """

    H: Tensor
    C: Tensor
    mean_inputs: Tensor | None = None
    mean_targets: Tensor | None = None
    strength: float = 0.0

    def damped_(self, w_NK: Tensor, damping: float) -> "NormalEquations":
        """Pull W towards `w_NK` [N, K]: add λ|W - w|² with λ = damping * mean diagonal of H; return these equations."""
        self.strength = max(damping * float(self.H.diagonal().mean()), torch.finfo(self.H.dtype).tiny)
        self.H.diagonal().add_(self.strength)
        self.C.add_(w_NK.to(self.C), alpha=self.strength)
        return self

    def bias_for(self, w_NK: Tensor) -> Tensor | None:
        """Return the bias that belongs to W, [N]; None without an intercept."""
        if self.mean_inputs is None or self.mean_targets is None:
            return None
        return self.mean_targets - w_NK.to(self.H) @ self.mean_inputs
