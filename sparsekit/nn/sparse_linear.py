"""The module that runs one packed weight."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.errors import CheckpointError, NonFiniteError, Unsupported
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec


class SparseLinear(nn.Linear):
    """`nn.Linear` whose weight is packed; y = x @ W.T + bias.

    It has two states. *Canonical*: the format's tensors (`values`, `meta`) are buffers; so it is built, and so a
    checkpoint is read, on the meta device too. *Prepared*: the backend's own layout has replaced them, and only it is
    in memory. `state_dict` always speaks canonical. `to()` converts through the canonical layout where the device or
    dtype changes, and prepares again.

    Attributes:
        spec: format, shape and dtype of the weight.
        requested_backend: what was asked for, "auto" or a name.
        backend: name of the backend in use; empty before `prepare_`.
        reasons: backend name -> why it was passed over.
        source: class of the layer this one stands for, "Linear" or "Conv1D"; `unpack_` builds that one.
    """

    spec: WeightSpec
    reasons: dict[str, str]

    def __init__(
        self,
        spec: WeightSpec,
        *,
        bias: bool = True,
        backend: str = "auto",
        source: str = "Linear",
        device: torch.device | str | None = None,
    ) -> None:
        """Build an empty layer in the canonical state, to be filled by `load_state_dict` or `from_linear`."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.spec = spec
        self.in_features, self.out_features = spec.in_features, spec.out_features
        self.requested_backend, self.backend, self.source = backend, "", source
        self.reasons = {}
        self._prepared_names: tuple[str, ...] = ()
        for name, (shape, dtype) in FORMATS.get(spec.format).parts(spec).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.out_features, dtype=spec.dtype, device=device))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_dense(
        cls,
        w_NK: Tensor,
        bias: Tensor | None = None,
        *,
        format: str = "semi24",
        backend: str = "auto",
        source: str = "Linear",
    ) -> "SparseLinear":
        """Return a layer, ready to run, for a weight that obeys the format's pattern.

        Raises:
            PatternError: it does not; the message says in how many groups.
            NonFiniteError: it holds NaN or infinity.
            Unsupported: the named backend cannot run here, or the format does not hold this dtype.
        """
        if not bool(torch.isfinite(w_NK).all()):
            raise NonFiniteError("the weight holds NaN or infinity: mend it before packing")
        packed = FORMATS.get(format).pack(w_NK.detach())
        resolve(backend, packed.spec, w_NK.device)
        layer = cls(packed.spec, bias=False, backend=backend, source=source, device="meta")
        layer._set_canonical(packed)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        layer.prepare_()
        return layer

    @classmethod
    def from_linear(cls, linear: nn.Module, format: str = "semi24", backend: str = "auto") -> "SparseLinear":
        """Return the packed equal of an `nn.Linear` or a transformers `Conv1D`; raises as `from_dense`."""
        source = "Conv1D" if type(linear).__name__ == "Conv1D" else "Linear"
        weight = cast(Tensor, linear.weight).detach()
        w_NK = weight.t() if source == "Conv1D" else weight
        layer = cls.from_dense(w_NK, cast(Tensor | None, linear.bias), format=format, backend=backend, source=source)
        return layer.train(linear.training)

    def prepare_(self) -> "SparseLinear":
        """Choose the backend and bring the weight into its layout; nothing happens where that is done already.

        Raises:
            CheckpointError: the canonical tensors are not a legal weight of this format.
            Unsupported: the requested backend cannot run here.
        """
        if self.is_prepared:
            return self
        packed = self.packed()
        device = packed.tensors[next(iter(packed.tensors))].device
        if device.type == "meta":
            return self
        FORMATS.get(self.spec.format).validate(packed)
        chosen, self.reasons = resolve(self.requested_backend, self.spec, device)
        prepared = chosen.prepare(packed)
        for name in packed.tensors:
            self._buffers[name] = None
        self._prepared_names = tuple(f"prepared_{i}" for i in range(len(prepared)))
        for name, tensor in zip(self._prepared_names, prepared, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.backend = chosen.name
        return self

    @property
    def is_prepared(self) -> bool:
        return bool(self._prepared_names)

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """The backend's own tensors; empty in the canonical state."""
        return tuple(getattr(self, name) for name in self._prepared_names)

    @property
    def format(self) -> str:
        """Name of the weight's format."""
        return self.spec.format

    def packed(self) -> PackedWeight:
        """Return the weight in its canonical layout."""
        if self.is_prepared:
            return BACKENDS.get(self.backend).restore(self.spec, self.prepared)
        parts = FORMATS.get(self.spec.format).parts(self.spec)
        return PackedWeight(self.spec, {name: cast(Tensor, self._buffers[name]) for name in parts})

    def to_dense(self) -> Tensor:
        """Return the dense weight [N, K], bit for bit what was packed (with +0.0 for -0.0)."""
        if self.is_prepared:
            return BACKENDS.get(self.backend).to_dense(self.spec, self.prepared)
        return FORMATS.get(self.spec.format).unpack(self.packed())

    def packed_bytes(self) -> int:
        """Return the bytes that the weight takes in memory as it is now."""
        tensors = self.prepared or tuple(self.packed().tensors.values())
        return sum(tensor.nbytes for tensor in tensors)

    def dense_bytes(self) -> int:
        """Return the bytes that the dense weight would take."""
        return self.spec.dense_bytes

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dense weight, unpacked anew at each access and read-only.

        Adapters read its dtype, device and values; a merge into it raises, since the result would break the pattern.
        """
        return self.to_dense().as_subclass(_ReadOnlyWeight)

    def forward(self, input: Tensor) -> Tensor:
        if not self._prepared_names:
            self.prepare_()
        if input.dtype != self.spec.dtype:
            input = self._match_dtype(input)
        prepared = tuple([getattr(self, name) for name in self._prepared_names])
        return BACKENDS.get(self.backend).linear(input, prepared, self.bias, self.spec)

    def extra_repr(self) -> str:
        backend = self.backend or f"{self.requested_backend}, not prepared"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.spec.format}, backend={backend}"
        )

    def _match_dtype(self, x: Tensor) -> Tensor:
        """Under autocast the weight's dtype decides; elsewhere a mismatch is a mistake, as in `nn.Linear`."""
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            return x.to(self.spec.dtype)
        raise ValueError(f"x is {x.dtype}, W is {self.spec.dtype}: convert one of them, as with model.to({x.dtype})")

    def _set_canonical(self, packed: PackedWeight) -> None:
        for name in self._prepared_names:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        self._prepared_names, self.backend = (), ""
        self.spec = packed.spec
        for name, tensor in packed.tensors.items():
            self._buffers[name] = tensor

    # What nn.Module does with buffers, through the canonical layout.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        probe = torch.empty(0, dtype=self.spec.dtype, device=self._device())
        moved = fn(probe)
        if moved.device == probe.device and moved.dtype == probe.dtype:
            super()._apply(fn, recurse)
            return self
        was_prepared = self.is_prepared
        spec = WeightSpec(self.format, self.out_features, self.in_features, moved.dtype)
        if moved.dtype not in FORMATS.get(self.format).dtypes:
            raise Unsupported(f"{self.format} does not hold {moved.dtype}: call sparsekit.unpack_(model) first")
        if was_prepared and moved.device.type != "meta":
            resolve(self.requested_backend, spec, moved.device)  # raises before anything has changed
            self._set_canonical(self.packed())
        elif was_prepared:
            self._set_canonical(self.packed())
        super()._apply(fn, recurse)
        if moved.dtype != probe.dtype:
            self.spec = spec
            if moved.device.type != "meta":  # a narrower dtype may have turned small values into zeros
                self._set_canonical(FORMATS.get(self.format).pack(self.to_dense()))
        return self.prepare_() if was_prepared else self

    def _device(self) -> torch.device:
        names = self._prepared_names or tuple(FORMATS.get(self.spec.format).parts(self.spec))
        return cast(Tensor, self._buffers[names[0]]).device

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in self.packed().tensors.items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = tuple(FORMATS.get(self.spec.format).parts(self.spec))
        was_prepared = self.is_prepared
        before = {name: getattr(self, name) for name in self._prepared_names}
        backend = self.backend
        if was_prepared and any(prefix + name in state_dict for name in names):
            # A copy: loading writes in place, `restore` may hand out the prepared tensors themselves, and a damaged
            # checkpoint must leave this layer as it was.
            copies = {name: part.clone() for name, part in self.packed().tensors.items()}
            self._set_canonical(PackedWeight(self.spec, copies))
        elif was_prepared:
            missing_keys.extend(prefix + name for name in names if strict)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if was_prepared and not self.is_prepared:
            try:
                self.prepare_()
            except CheckpointError as error:
                error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
                for name in names:
                    self._buffers[name] = None
                for name, tensor in before.items():
                    self.register_buffer(name, tensor, persistent=False)
                self._prepared_names, self.backend = tuple(before), backend


class _ReadOnlyWeight(Tensor):
    """A dense copy of a packed weight. Writing to it would be lost without a word, so it raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS
        setter = name == "__set__"
        if (in_place and name not in _HARMLESS or setter) and args and isinstance(args[0], _ReadOnlyWeight):
            raise Unsupported(
                "the weight of a packed layer is read-only, and what you write would break its zeros: keep adapters "
                "unmerged, or call sparsekit.unpack_(model), merge there, and prune again"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        if name == "__get__" and isinstance(result, Tensor) and not isinstance(result, _ReadOnlyWeight):
            return result.as_subclass(_ReadOnlyWeight)  # .data and .T of it stay read-only
        return result


_IN_PLACE_OPERATORS = frozenset(
    {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__setitem__"}
)
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_", "retain_grad_"})
