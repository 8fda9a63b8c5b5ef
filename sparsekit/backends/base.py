"""What every backend offers, and how one is chosen."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from sparsekit import ops
from sparsekit.errors import Unsupported
from sparsekit.formats import PackedWeight, WeightSpec
from sparsekit.registry import Registry


class Runner(ABC):
    """Runs one format on one backend.

    It derives its own layout in `prepare`, once; it replaces the canonical tensors in memory and is never saved. One
    prepared copy serves every number of tokens.
    """

    format: str

    @abstractmethod
    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        """Return a sentence that says why `spec` cannot run on `device`, or None if it can."""

    @abstractmethod
    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        """Return this backend's own layout of a canonical weight."""

    @abstractmethod
    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        """Return the canonical weight, bit for bit: the inverse of `prepare`."""

    @abstractmethod
    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        """Return x @ W.T + bias; x is [..., K] in the weight's dtype, the result [..., N]."""

    @abstractmethod
    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        """Return the dense weight [N, K]."""

    @abstractmethod
    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        """Return what runs for this many tokens."""


class Backend:
    """Runs packed weights on some machines: a `Runner`, and a pair of operators, for each format it has.

    Args:
        name: as users write it.
        runners: one for each format.
        is_fallback: right but not fast; `auto` warns when nothing better runs.
    """

    def __init__(self, name: str, runners: Iterable[Runner], is_fallback: bool = False) -> None:
        self.name, self.is_fallback = name, is_fallback
        self._runners = {runner.format: runner for runner in runners}
        self._ops = {
            format: ops.define(format, name, runner.linear, runner.dense) for format, runner in self._runners.items()
        }

    @property
    def formats(self) -> tuple[str, ...]:
        """Names of the formats it has a path for."""
        return tuple(self._runners)

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        """Return a sentence that says why this backend cannot run `spec` on `device`, or None if it can."""
        if spec.format not in self._runners:
            return f"it has no path for format {spec.format!r}"
        return self._runners[spec.format].why_not(spec, device)

    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        """Return this backend's own layout of a canonical weight."""
        return self._runners[packed.spec.format].prepare(packed)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        """Return the canonical weight, bit for bit: the inverse of `prepare`."""
        return self._runners[spec.format].restore(spec, prepared)

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Return x @ W.T + bias; x is [..., K] in the weight's dtype, the result [..., N]."""
        return self._ops[spec.format].linear(x, prepared, bias, spec.out_features, spec.in_features)

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the dense weight [N, K]; through an operator, so that compilers can look past it."""
        return self._ops[spec.format].dense(prepared, spec.out_features, spec.in_features, spec.dtype)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        """Return what runs for this many tokens."""
        return self._runners[spec.format].kernel(spec, num_tokens)


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
