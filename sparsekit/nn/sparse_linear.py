"""The module that runs one packed weight."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.errors import CheckpointError, NonFiniteError, Unsupported
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec
from sparsekit.formats.base import with_dtype


class SparseLinear(nn.Linear):
    """`nn.Linear` whose weight is packed; y = x @ W.T + bias.

    It has two states. *Canonical*: the format's tensors (`values`, `meta`) are buffers; so it is built, and so a
    checkpoint is read, on the meta device too. *Prepared*: the backend's own layout has replaced them, and only it is
    in memory. `state_dict` always speaks canonical. `to()` converts through the canonical layout where the device or
    dtype changes, and prepares again. Under autocast the product is computed in the weight's dtype and returned in
    autocast's.

    Attributes:
        spec: format, shape and dtype of the weight.
        requested_backend: what was asked for, "auto" or a name.
        backend: name of the backend in use; empty before `prepare_`.
        reasons: backend name -> why it was passed over.
        dense_requires_grad: whether the dense weight that `unpack_` builds shall want gradients.
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
        self.reasons, self.dense_requires_grad = {}, True
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
        scales: Tensor | None = None,
    ) -> "SparseLinear":
        """Return a layer, ready to run, for a weight that obeys the format's pattern.

        Args:
            scales: the grid of a quantised format; None lets the format choose.
        Raises:
            PatternError: it does not; the message says in how many groups.
            NonFiniteError: it holds NaN or infinity.
            Unsupported: the named backend cannot run here, or the format does not hold this dtype.
        """
        if not bool(torch.isfinite(w_NK).all()):
            raise NonFiniteError("the weight holds NaN or infinity: mend it before packing")
        packed = FORMATS.get(format).pack(w_NK.detach(), scales)
        resolve(backend, packed.spec, w_NK.device)
        layer = cls(packed.spec, bias=False, backend=backend, source=source, device="meta")
        layer._set_canonical(packed)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        layer.prepare_()
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Module, format: str = "semi24", backend: str = "auto", scales: Tensor | None = None
    ) -> "SparseLinear":
        """Return the packed equal of an `nn.Linear` or a transformers `Conv1D`; raises as `from_dense`."""
        source = "Conv1D" if type(linear).__name__ == "Conv1D" else "Linear"
        weight = cast(Tensor, linear.weight).detach()
        w_NK = weight.t() if source == "Conv1D" else weight
        bias = cast(Tensor | None, linear.bias)
        layer = cls.from_dense(w_NK, bias, format=format, backend=backend, source=source, scales=scales)
        layer.dense_requires_grad = cast(Tensor, linear.weight).requires_grad
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
        self._set_prepared(prepared, chosen.name)
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
        """Return the dense weight [N, K]: bit for bit what was packed, or what it was rounded to; +0.0 for -0.0."""
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
        weight = self.to_dense()
        if torch.compiler.is_compiling():
            return weight
        read_only: Any = weight.as_subclass(_ReadOnlyWeight)
        read_only._is_hf_initialized = True  # or transformers draws random numbers into it while it loads GPT-2
        return read_only

    def forward(self, input: Tensor) -> Tensor:
        if not self._prepared_names:
            self.prepare_()
        if input.dtype != self.spec.dtype:
            input = self._match_dtype(input)
        buffers: Any = self._buffers  # past nn.Module.__getattr__, which costs half a microsecond a tensor
        prepared = tuple([buffers[name] for name in self._prepared_names])
        output = BACKENDS.get(self.backend).linear(input, prepared, self.bias, self.spec)
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

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

    def _set_prepared(self, prepared: tuple[Tensor, ...], backend: str) -> None:
        for name in FORMATS.get(self.spec.format).parts(self.spec):
            self._buffers[name] = None
        self._prepared_names = tuple(f"prepared_{i}" for i in range(len(prepared)))
        for name, tensor in zip(self._prepared_names, prepared, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.backend = backend

    # What nn.Module does with buffers, through the canonical layout.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseLinear":
        probe = torch.empty(0, dtype=self.spec.dtype, device=self._device())
        moved = fn(probe)

        if moved.device == probe.device and moved.dtype == probe.dtype:
            super()._apply(lambda tensor: _moved(fn, tensor), recurse)
            return self
        spec = with_dtype(self.spec, moved.dtype)
        if moved.dtype not in FORMATS.get(self.format).dtypes:
            raise Unsupported(f"{self.format} does not hold {moved.dtype}: call sparsekit.unpack_(model) first")
        was_prepared = self.is_prepared
        if was_prepared and moved.device.type != "meta":
            resolve(self.requested_backend, spec, moved.device)  # raises before anything has changed
        there = {name: _moved(fn, tensor) for name, tensor in self.packed().tensors.items()}
        packed = PackedWeight(self.spec, {name: tensor.to(moved.device) for name, tensor in there.items()})
        if moved.dtype != probe.dtype:
            packed = FORMATS.get(self.format).cast(packed, moved.dtype)
        for name in self._buffers:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        self._set_canonical(packed)
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
        arguments = (state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        keys = [prefix + name for name in FORMATS.get(self.spec.format).parts(self.spec)]
        if not self.is_prepared or not any(key in state_dict for key in keys):
            if self.is_prepared and strict:
                missing_keys.extend(keys)
            super()._load_from_state_dict(*arguments)
            return
        # All or nothing: half of a weight, or a damaged one, leaves this layer as it was. Loading writes in place and
        # `restore` may hand out the prepared tensors themselves, so it goes into a copy.
        prepared, backend, bias = self.prepared, self.backend, self.bias
        bias_values = None if bias is None else bias.detach().clone()
        num_errors = len(error_msgs)
        copies = {name: part.clone() for name, part in self.packed().tensors.items()}
        self._set_canonical(PackedWeight(self.spec, copies))
        super()._load_from_state_dict(*arguments)
        try:
            if all(key in state_dict for key in keys) and len(error_msgs) == num_errors:
                self.prepare_()
        except CheckpointError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
        if not self.is_prepared:
            self._set_prepared(prepared, backend)
        if len(error_msgs) > num_errors and bias is not None and bias_values is not None:
            self.bias = bias
            with torch.no_grad():
                bias.copy_(bias_values)


def _moved(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn(tensor)`, but for a change of dtype: of indices, quantised values and scales it would make something else."""
    new = fn(tensor)
    return new if new.dtype == tensor.dtype else tensor.to(new.device)


class _ReadOnlyWeight(Tensor):
    """A dense copy of a packed weight. Writing to it would be lost without a word, so it raises."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE_OPERATORS or name == "__set__"
        first = args[0] if args else kwargs.get("tensor")  # torch.nn.init passes it by name
        written = first if in_place and name not in _HARMLESS else kwargs.get("out")
        if isinstance(written, _ReadOnlyWeight):
            raise Unsupported(
                "the weight of a packed layer is read-only, and what you write would break its zeros: keep adapters "
                "unmerged, or call sparsekit.unpack_(model), merge there, and prune again"
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                result.flags.writeable = False
                return result
            view = type(result) is Tensor and isinstance(first, Tensor) and _share_memory(result, first)
        return result.as_subclass(_ReadOnlyWeight) if view else result  # .data, .T, .detach() of it stay read-only


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


_IN_PLACE_OPERATORS = frozenset(
    {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__ifloordiv__", "__imod__", "__ipow__", "__setitem__"}
)
_HARMLESS = frozenset({"requires_grad_", "detach_", "share_memory_", "retain_grad_"})
