"""The module that runs one packed weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.errors import CheckpointError, NonFiniteError, Unsupported
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec
from sparsekit.formats.base import with_dtype
from sparsekit.nn.side import SideLinear
from sparsekit.nn.side_columns import SideColumns, X_of, pack_with_side
from sparsekit.ops import SparseOp
from sparsekit.plan import SideBranch

if TYPE_CHECKING:
    from sparsekit.nn.fused import FusedGroup

_is_autocast_on_anywhere = torch._C._is_any_autocast_enabled  # half the price of asking for one device


@dataclass(frozen=True)
class Share:
    """A layer's part in a weight that several layers hold together, see `sparsekit.nn.fused`.

    Attributes:
        group: who runs it.
        index: the layer's place in the group.
        first_row: where its rows begin.
        spec: of the whole.
    """

    group: FusedGroup
    index: int
    first_row: int
    spec: WeightSpec


class SparseLinear(nn.Linear):
    """`nn.Linear` whose weight is packed; y = x @ W.T + bias.

    It has two states. *Canonical*: the format's tensors (`values`, `meta`) are buffers; so it is built, and so a
    checkpoint is read, on the meta device too. *Prepared*: the backend's own layout has replaced them, and only it is
    in memory. `state_dict` always speaks canonical. `to()` converts through the canonical layout where the device or
    dtype changes, and prepares again. Under autocast the product is computed in the weight's dtype and returned in
    autocast's. A *fused* layer is a prepared one whose tensors hold other layers' rows too.

    A layer with a side branch, y = x @ W.T + bias + z @ S.T, holds S as further columns of the packed weight, and
    multiplies them by what it puts behind x, see `sparsekit.nn.side_columns`.

    Attributes:
        spec: format, shape and dtype of what is packed: the weight, and its side branch where it has one.
        side: where the branch lies in it; None where there is none.
        requested_backend: what was asked for, "auto" or a name.
        prefill: what was asked for, see `sparsekit.backends.PREFILLS`.
        backend: name of the backend in use; empty before `prepare_`.
        reasons: backend name -> why it was passed over.
        group: the layers that it is fused with whenever they are on one device; None where it stands alone.
        fusion: with which layers it shares a launch, or why it does not; empty where nobody asked.
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
        prefill: str = "dense",
        source: str = "Linear",
        side: SideColumns | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Build an empty layer in the canonical state, to be filled by `load_state_dict` or `from_linear`."""
        nn.Module.__init__(self)  # nn.Linear's own would allocate the dense weight
        self.spec, self.side = spec, side
        self.in_features = spec.in_features if side is None else side.in_features
        self.out_features = spec.out_features
        self.requested_backend, self.prefill, self.source = backend, prefill, source
        self.backend, self.reasons, self.fusion = "", {}, ""
        self.dense_requires_grad = True
        self._op: SparseOp | None = None
        self._prepared_names: tuple[str, ...] = ()
        self._share: Share | None = None
        self.group: FusedGroup | None = None
        for name, (shape, dtype) in FORMATS.get(spec.format).parts(spec).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device=device))
        if side is not None:
            for name, (shape, dtype) in side.parts_beside(spec.dtype, FORMATS.get(spec.format).lossless).items():
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
        prefill: str = "dense",
        source: str = "Linear",
        scales: Tensor | None = None,
        branch: SideBranch | None = None,
    ) -> SparseLinear:
        """Return a layer, ready to run, for a weight that obeys the format's pattern.

        Args:
            scales: the grid of a quantised format; None lets the format choose.
            branch: runs beside the weight; in the weight's dtype and on its device.
            prefill: "dense", "cusparselt" or "auto", see `pack_`.
        Raises:
            PatternError: it does not; the message says in how many groups.
            NonFiniteError: it holds NaN or infinity, or the branch does.
            Unsupported: the named backend cannot run here, or the format does not hold this dtype, or no branch.
        """
        if not bool(torch.isfinite(w_NK).all()):
            raise NonFiniteError("the weight holds NaN or infinity: mend it before packing")
        kind, side, beside = FORMATS.get(format), None, dict[str, Tensor]()
        if branch is None:
            packed = kind.pack(w_NK.detach(), scales)
        else:
            packed, side, beside = pack_with_side(kind, w_NK.detach(), branch, scales)
        resolve(backend, packed.spec, w_NK.device, prefill)
        layer = cls(packed.spec, bias=False, backend=backend, prefill=prefill, source=source, side=side, device="meta")
        layer._set_canonical(packed)
        layer._buffers.update(beside)
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias.detach().clone())
        layer.prepare_()
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        format: str = "semi24",
        backend: str = "auto",
        scales: Tensor | None = None,
        prefill: str = "dense",
    ) -> SparseLinear:
        """Return the packed equal of an `nn.Linear`, `SideLinear` or transformers `Conv1D`; raises as `from_dense`."""
        is_conv1d = type(linear).__name__ == "Conv1D"
        weight = cast(Tensor, linear.weight).detach()
        layer = cls.from_dense(
            weight.t() if is_conv1d else weight,
            cast(Tensor | None, linear.bias),
            format=format,
            backend=backend,
            prefill=prefill,
            source=linear.source if isinstance(linear, SideLinear) else "Conv1D" if is_conv1d else "Linear",
            scales=scales,
            branch=linear.branch if isinstance(linear, SideLinear) else None,
        )
        layer.dense_requires_grad = cast(Tensor, linear.weight).requires_grad
        return layer.train(linear.training)

    def prepare_(self) -> SparseLinear:
        """Choose the backend and bring the weight into its layout; nothing happens where that is done already.

        Raises:
            CheckpointError: the canonical tensors are not a legal weight of this format.
            Unsupported: the requested backend cannot run here.
        """
        if self.is_prepared or self.device.type == "meta" or (self.group is not None and self.group.fuse_()):
            return self
        packed = self.packed()
        FORMATS.get(self.spec.format).validate(packed)
        self._validate_side()
        chosen, self.reasons = resolve(self.requested_backend, self.spec, self.device, self.prefill)
        self._set_prepared(chosen.prepare(packed, self.prefill), chosen.name)
        return self

    def set_prefill_(self, prefill: str) -> SparseLinear:
        """Prepare the weight anew for another `prefill`; a fused one once all of its group have the same.

        Raises:
            Unsupported: the requested backend has no such path. Nothing has changed.
        """
        if prefill != self.prefill:
            resolve(self.requested_backend, self.spec, self.device, prefill)
            if self._share is not None:
                self._share.group.dissolve_()
            self._set_canonical(self.packed())
            self.prefill = prefill
            self._settle()
        return self

    @property
    def is_prepared(self) -> bool:
        return self._op is not None

    @property
    def is_fused(self) -> bool:
        """Whether its product is computed together with other layers'."""
        return self._share is not None

    @property
    def prepared(self) -> tuple[Tensor, ...]:
        """The backend's own tensors; empty in the canonical state. Those of a fused layer hold the whole group."""
        buffers: Any = self._buffers
        return tuple([buffers[name] for name in self._prepared_names])

    @property
    def device(self) -> torch.device:
        """Where the weight is."""
        names = self._prepared_names or tuple(FORMATS.get(self.spec.format).parts(self.spec))
        return cast(Tensor, self._buffers[names[0]]).device

    @property
    def format(self) -> str:
        """Name of the weight's format."""
        return self.spec.format

    def packed(self) -> PackedWeight:
        """Return the weight in its canonical layout."""
        if self.is_prepared:
            whole = BACKENDS.get(self.backend).restore(self._prepared_spec, self.prepared)
            if not self.is_fused:
                return whole
            return PackedWeight(self.spec, {name: self._own_rows(part) for name, part in whole.tensors.items()})
        parts = FORMATS.get(self.spec.format).parts(self.spec)
        return PackedWeight(self.spec, {name: cast(Tensor, self._buffers[name]) for name in parts})

    def to_dense(self) -> Tensor:
        """Return the dense weight [N, K]: bit for bit what was packed, or what it was rounded to; +0.0 for -0.0."""
        whole = self._unpacked()
        return whole if self.side is None else self.side.split(whole)[0]

    def side_branch(self) -> SideBranch | None:
        """Return a copy of the side branch, as exact as `to_dense`; None where there is none."""
        if self.side is None:
            return None
        S = self.side.split(self._unpacked(), self._buffers.get("side_scale"))[1]
        X = X_of(self._buffers)
        return SideBranch(S, None if X is None else X.clone(), self.side.group)

    def side_tensors(self) -> dict[str, Tensor]:
        """Return what the side branch has beside the packed weight, see `SideColumns.parts_beside`."""
        return {name: tensor for name in _SIDE if (tensor := self._buffers.get(name)) is not None}

    def _unpacked(self) -> Tensor:
        """The weight and, behind it, the columns of the side branch, dense."""
        if self.is_prepared:
            whole = BACKENDS.get(self.backend).to_dense(self._prepared_spec, self.prepared)
            return self._own_rows(whole) if self.is_fused else whole
        return FORMATS.get(self.spec.format).unpack(self.packed())

    def packed_bytes(self) -> int:
        """Return the bytes that the weight takes in memory as it is now; with its side branch, and with a second copy
        for prefill."""
        tensors = self.prepared or tuple(self.packed().tensors.values())
        beside = sum(tensor.nbytes for tensor in self.side_tensors().values())
        return self._own_bytes(sum(tensor.nbytes for tensor in tensors)) + beside

    def second_copy_bytes(self) -> int:
        """Return how many of `packed_bytes` are a second copy of the weight, kept for prefill."""
        if not self.is_prepared:
            return 0
        return self._own_bytes(BACKENDS.get(self.backend).second_copy_bytes(self._prepared_spec, self.prepared))

    def dense_bytes(self) -> int:
        """Return the bytes that the dense weight would take, without a branch."""
        return self.out_features * self.in_features * self.spec.dtype.itemsize

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
        if self._op is None:
            self.prepare_()
        if input.dtype is not self.spec.dtype or _is_autocast_on_anywhere():
            return self._forward_in_autocast(input)
        return self._linear(input, input)

    def _forward_in_autocast(self, input: Tensor) -> Tensor:
        """The product in the weight's dtype and the result in autocast's; without autocast, a dtype is a mistake."""
        device, dtype = input.device.type, self.spec.dtype
        enabled = torch.is_autocast_enabled(device)
        if input.dtype != dtype and not (enabled and input.is_floating_point()):
            raise ValueError(f"x is {input.dtype}, W is {dtype}: convert one of them, as with model.to({input.dtype})")
        output = self._linear(input.to(dtype), input)
        return output.to(torch.get_autocast_dtype(device)) if enabled else output

    def _linear(self, x: Tensor, source: Tensor) -> Tensor:
        """Return the product with x, which is `source`, the input, in the weight's dtype."""
        share = self._share
        if share is not None:
            return share.group.linear(self, share, x, source)
        if self.side is not None:
            x = self.extended(x)
        # Past nn.Module.__getattr__, which costs half a microsecond a tensor.
        buffers: Any = self._buffers
        weight = [buffers[name] for name in self._prepared_names]
        op: Any = self._op
        return op.linear(x, weight, self.own_bias(), self.out_features, self.spec.in_features)

    def extended(self, x: Tensor) -> Tensor:
        """Return what the packed weight multiplies: x [..., K] and behind it the input of the side branch, if any."""
        if self.side is None:
            return x
        return self.side.extend(x, X_of(self._buffers), self._buffers.get("side_scale"))

    def own_bias(self) -> Tensor | None:
        """Return `bias`, by the short way where there is one: a parametrized bias is no parameter."""
        parameters = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias

    def extra_repr(self) -> str:
        backend = self.backend or f"{self.requested_backend}, not prepared"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.spec.format}, backend={backend}"
            + (f", side rank={self.side.rank}" if self.side is not None else "")
            + (f", prefill={self.prefill}" if self.prefill != "dense" else "")
            + (f", fused {self.fusion}" if self.is_fused else "")
        )

    def reads_like(self, other: SparseLinear) -> bool:
        """Return whether both put the same behind x: nothing, or the inputs of side branches with the same X."""
        mine, others = self.side_tensors(), other.side_tensors()
        same = self.side == other.side and mine.keys() == others.keys()
        return same and all(torch.equal(tensor, others[name]) for name, tensor in mine.items())

    def _validate_side(self) -> None:
        for name, tensor in self.side_tensors().items():
            if not bool(tensor.isfinite().all()) or (name != "side_X" and not bool((tensor > 0).all())):
                raise CheckpointError(
                    f"{name} holds NaN, infinity or no scale: the checkpoint is damaged, fetch it again"
                )

    @property
    def _prepared_spec(self) -> WeightSpec:
        return self.spec if self._share is None else self._share.spec

    def _own_rows(self, tensor: Tensor) -> Tensor:
        """This layer's rows of a tensor of its group, in memory of their own."""
        share = cast(Share, self._share)
        return tensor.narrow(0, share.first_row, self.out_features).clone()

    def _own_bytes(self, nbytes: int) -> int:
        """This layer's share of the bytes of its group; the shares add up to the whole."""
        if self._share is None:
            return nbytes
        before, N = self._share.first_row, self._share.spec.out_features
        return nbytes * (before + self.out_features) // N - nbytes * before // N

    def _set_canonical(self, packed: PackedWeight) -> None:
        for name in self._prepared_names:
            del self._buffers[name]
            self._non_persistent_buffers_set.discard(name)
        self._prepared_names, self.backend, self._op, self._share = (), "", None, None
        self.spec = packed.spec
        for name, tensor in packed.tensors.items():
            self._buffers[name] = tensor

    def _set_prepared(self, prepared: tuple[Tensor, ...], backend: str, share: Share | None = None) -> None:
        for name in FORMATS.get(self.spec.format).parts(self.spec):
            self._buffers[name] = None
        self._prepared_names = tuple(f"prepared_{i}" for i in range(len(prepared)))
        for name, tensor in zip(self._prepared_names, prepared, strict=True):
            self.register_buffer(name, tensor, persistent=False)
        self.backend, self._op, self._share = backend, BACKENDS.get(backend).op(self.spec.format), share

    # What nn.Module does with buffers, through the canonical layout.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        probe = torch.empty(0, dtype=self.spec.dtype, device=self.device)
        moved = fn(probe)
        if moved.device == probe.device and moved.dtype == probe.dtype:
            super()._apply(lambda tensor: _moved(fn, tensor), recurse)
            if self._share is not None:
                self._share.group.share_({name: self._buffers[name] for name in self._prepared_names})
            return self
        spec = with_dtype(self.spec, moved.dtype)
        if moved.dtype not in FORMATS.get(self.format).dtypes:
            raise Unsupported(f"{self.format} does not hold {moved.dtype}: call sparsekit.unpack_(model) first")
        was_prepared = self.is_prepared
        if was_prepared and moved.device.type != "meta":
            resolve(self.requested_backend, spec, moved.device, self.prefill)  # raises before anything has changed
        if self.group is not None and moved.device.type == "meta":
            self.group.disband_()  # what comes back from there is another weight
        elif self._share is not None:
            self._share.group.dissolve_()
        there = {name: _moved(fn, tensor) for name, tensor in self.packed().tensors.items()}
        packed = PackedWeight(self.spec, {name: tensor.to(moved.device) for name, tensor in there.items()})
        if moved.dtype != probe.dtype:
            packed = FORMATS.get(self.format).cast(packed, moved.dtype)
        for name in [name for name in self._buffers if name not in _SIDE]:
            self._buffers[name] = None
        super()._apply(lambda tensor: fn(tensor) if tensor.is_floating_point() else _moved(fn, tensor), recurse)
        self._set_canonical(packed)
        if was_prepared or self.group is not None:
            self._settle()
        return self

    def _settle(self) -> None:
        """Prepare after a change; a group when the last of it has come. What changed alone prepares when it runs."""
        if self.group is None:
            self.prepare_()
        else:
            self.group.fuse_()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        for name, tensor in (self.packed().tensors | self.side_tensors()).items():
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
        before, bias = self.packed(), self.bias
        beside = {name: tensor.clone() for name, tensor in self.side_tensors().items()}
        bias_values = None if bias is None else bias.detach().clone()
        num_errors = len(error_msgs)
        if self._share is not None:
            self._share.group.dissolve_()
        copies = {name: part.clone() for name, part in before.tensors.items()}
        self._set_canonical(PackedWeight(self.spec, copies))
        super()._load_from_state_dict(*arguments)
        try:
            if all(key in state_dict for key in keys) and len(error_msgs) == num_errors:
                self.prepare_()
        except CheckpointError as error:
            error_msgs.append(f"{prefix.removesuffix('.')}: {error}")
        if not self.is_prepared:
            self._set_canonical(before)
            self._buffers.update(beside)
            self.prepare_()
        if len(error_msgs) > num_errors and bias is not None and bias_values is not None:
            self.bias = bias
            with torch.no_grad():
                bias.copy_(bias_values)


_SIDE = ("side_X", "side_X_scale", "side_scale")


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
