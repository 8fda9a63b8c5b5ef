"""What every backend offers, and how one is chosen."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparsekit.errors import Unsupported
from sparsekit.formats import PackedWeight, WeightSpec
from sparsekit.registry import Registry


class Backend(ABC):
    """Runs packed weights on some machines.

    A backend derives its own layout in `prepare`, once; it replaces the canonical tensors in memory and is never
    saved. One prepared copy serves every number of tokens.
    """

    name: str
    is_fallback: bool = False
    """True for a backend that is right but not fast; `auto` warns when nothing better runs."""

    @abstractmethod
    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        """Return a sentence that says why this backend cannot run `spec` on `device`, or None if it can."""

    @abstractmethod
    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        """Return this backend's own layout of a canonical weight."""

    @abstractmethod
    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        """Return the canonical weight, bit for bit: the inverse of `prepare`."""

    @abstractmethod
    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Return x @ W.T + bias; x is [..., K] in the weight's dtype, the result [..., N]."""

    @abstractmethod
    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        """Return what runs for this many tokens."""

    @abstractmethod
    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the dense weight [N, K]; through an operator, so that compilers can look past it."""


BACKENDS: Registry[Backend] = Registry("backend")


def resolve(name: str, spec: WeightSpec, device: torch.device) -> tuple[Backend, dict[str, str]]:
    """Return the backend that runs `spec` on `device`, and what the ones asked before it answered.

    Args:
        name: a name in `BACKENDS`, or "auto" for the first that can.
    Raises:
        ValueError: no backend has this name.
        Unsupported: the named backend cannot run here; the message has its answer.
    """
    if name != "auto":
        backend = BACKENDS.get(name)
        reason = backend.why_not(spec, device)
        if reason:
            raise Unsupported(f"backend {name!r} cannot run {spec} on {device}: {reason}. Use backend='auto'.")
        return backend, {}
    reasons: dict[str, str] = {}
    for candidate_name, candidate in BACKENDS.items():
        reason = candidate.why_not(spec, device)
        if reason is None:
            return candidate, reasons
        reasons[candidate_name] = reason
    raise Unsupported(f"no backend runs {spec} on {device}: {reasons}")
