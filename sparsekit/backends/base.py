"""What every backend offers, and how one is chosen."""

import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from sparsekit import ops
from sparsekit.errors import Unsupported
from sparsekit.formats import PackedWeight, WeightSpec
from sparsekit.ops import SparseOp
from sparsekit.registry import Registry

PREFILLS = ("dense", "cusparselt", "auto")
"""What may serve many tokens at a time: the one prepared copy, expanded into scratch where that is faster ("dense"); a
second copy of the weight in cuSPARSELt's layout; or whichever the backend finds faster on this machine."""


@functools.cache
def kernels(name: str) -> ModuleType:
    """Import a module of `sparsekit_kernels` when it first runs: a machine without Triton or a compiler never asks."""
    return importlib.import_module(f"sparsekit_kernels.{name}")


class Runner(ABC):
    """Runs one format on one backend.

    It derives its own layout in `prepare`, once; it replaces the canonical tensors in memory and is never saved. One
    prepared copy serves every number of tokens, unless the user asks for a second one by `prefill`.

    Attributes:
        format: name in `FORMATS`.
        prefills: the members of `PREFILLS` that `prepare` knows how to serve. "auto" is always among the accepted
            ones: a runner that lists "dense" alone has nothing to choose from.
    """

    format: str
    prefills: tuple[str, ...] = ("dense",)

    @abstractmethod
    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        """Return a sentence that says why `spec` cannot run on `device`, or None if it can."""

    @abstractmethod
    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        """Return this backend's own layout of a canonical weight.

        Args:
            packed: the weight.
            prefill: a member of `prefills`, or "auto".
        """

    def second_copy_bytes(self, prepared: Sequence[Tensor]) -> int:
        """Return how many bytes of `prepared` are a second copy of the weight, kept for prefill."""
        return 0

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
    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        """Return what runs for this many tokens.

        Args:
            device: where the weight is; None for the GPU in use.
            prepared: the weight itself, where there is one: it may hold a second copy.
        """

    def against_dense(self, spec: WeightSpec, device: torch.device, prepared: Sequence[Tensor] = ()) -> str:
        """Return where a dense weight was measured to be faster on this device, if the backend keeps such tables."""
        return ""

    def stays_dense(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str:
        """Return a sentence that says why the weight had better stay dense, by measurement; empty where it had not."""
        return ""

    def unmeasured(self, spec: WeightSpec, device: torch.device) -> str:
        """Return how to measure what `prefill="auto"` chooses by; empty where that is known, or there is no choice."""
        return ""


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

    def why_not(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str | None:
        """Return a sentence that says why this backend cannot run `spec` on `device`, or None if it can."""
        if spec.format not in self._runners:
            return f"it has no path for format {spec.format!r}"
        runner = self._runners[spec.format]
        if prefill not in ("auto", *runner.prefills):
            return f"it has no {prefill!r} path for prefill, only {', '.join(map(repr, runner.prefills))}"
        return runner.why_not(spec, device)

    def op(self, format: str) -> SparseOp:
        """Return the operators of a format."""
        return self._ops[format]

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        """Return this backend's own layout of a canonical weight; `prefill` is a member of `PREFILLS`."""
        return self._runners[packed.spec.format].prepare(packed, prefill)

    def second_copy_bytes(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> int:
        """Return how many bytes of `prepared` are a second copy of the weight, kept for prefill."""
        return self._runners[spec.format].second_copy_bytes(prepared)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        """Return the canonical weight, bit for bit: the inverse of `prepare`."""
        packed = self._runners[spec.format].restore(spec, prepared)
        # A view of padded rows would be saved with the padding, or not at all.
        whole = {name: part if _owns_its_storage(part) else part.clone() for name, part in packed.tensors.items()}
        return PackedWeight(spec, whole)

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        """Return x @ W.T + bias; x is [..., K] in the weight's dtype, the result [..., N]."""
        return self._ops[spec.format].linear(x, prepared, bias, spec.out_features, spec.in_features)

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        """Return the dense weight [N, K]; through an operator, so that compilers can look past it."""
        return self._ops[spec.format].dense(prepared, spec.out_features, spec.in_features, spec.dtype)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        """Return what runs for this many tokens; `device` and `prepared` as `Runner.kernel` takes them."""
        return self._runners[spec.format].kernel(spec, num_tokens, device, prepared)

    def against_dense(self, spec: WeightSpec, device: torch.device, prepared: Sequence[Tensor] = ()) -> str:
        """Return where a dense weight was measured to be faster on this device, if the backend keeps such tables."""
        return self._runners[spec.format].against_dense(spec, device, prepared)

    def stays_dense(self, spec: WeightSpec, device: torch.device, prefill: str = "dense") -> str:
        """Return a sentence that says why the weight had better stay dense, by measurement; empty where it had not."""
        return self._runners[spec.format].stays_dense(spec, device, prefill)

    def unmeasured(self, spec: WeightSpec, device: torch.device) -> str:
        """Return how to measure what `prefill="auto"` chooses by; empty where that is known, or there is no choice."""
        return self._runners[spec.format].unmeasured(spec, device)


def _owns_its_storage(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() == tensor.nbytes


BACKENDS: Registry[Backend] = Registry("backend", meant={"gpu": "triton", "cuda": "triton"})


def resolve(
    name: str, spec: WeightSpec, device: torch.device, prefill: str = "dense"
) -> tuple[Backend, dict[str, str]]:
    """Return the backend that runs `spec` on `device`, and what the ones asked before it answered.

    Args:
        name: a name in `BACKENDS`, or "auto" for the first that can.
        prefill: a member of `PREFILLS`.
    Raises:
        ValueError: no backend has this name, or `prefill` is none.
        Unsupported: the named backend cannot run here; the message has its answer.
    """
    if prefill not in PREFILLS:
        raise ValueError(f"prefill={prefill!r} is none of {', '.join(map(repr, PREFILLS))}")
    remedy = "Use backend='auto'" + ("" if prefill in ("dense", "auto") else " or prefill='dense'")
    BACKENDS.check(name)
    if name != "auto":
        backend = BACKENDS.get(name)
        reason = backend.why_not(spec, device, prefill)
        if reason:
            raise Unsupported(f"backend {name!r} cannot run {spec} on {device}: {reason}. {remedy}.")
        return backend, {}
    reasons: dict[str, str] = {}
    for candidate_name, candidate in BACKENDS.items():
        reason = candidate.why_not(spec, device, prefill)
        if reason is None:
            return candidate, reasons
        reasons[candidate_name] = reason
    answers = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items())
    raise Unsupported(f"no backend runs {spec} on {device} with prefill={prefill!r}: {answers}")
