"""Layers that read the same input, as q, k and v of an attention do, run by one product.

Their packed weights are stacked along N into one, which the backend prepares as it prepares any other; every layer of
the group holds these same tensors and knows which rows are its own, so there is no second copy. Each row of a product
is its own sum, so the numbers are those of the layers apart wherever the kernel adds in an order that does not depend
on N.

The layers stay where they are, under their names, and are called one after the other by the forward of their parent,
which knows nothing of this. Hooks on the parent open a scope before its forward and close it after, also when it
raises an `Exception`. Within it, the first layer called computes the product for all and keeps it; each of the others
takes its columns, once, if it is called with the very same tensor, unwritten since (`Tensor._version`), with the same
biases, in the same gradient mode. What nobody took is dropped when the scope closes. Threads have scopes of their own.

A version does not tell of every write (`x.data`, dlpack), inference tensors have none, and a compiler does not show
it. So the scope opens only where nothing but code that we know runs between the calls: the parent is of a class in
`SAME_INPUT`, whose forward does not write to its input, and no hook, global or on a module within the parent, no other
forward that was set on an instance, and no wrapper but peft's stands in between. Adapters are taken by their word.

Everywhere else, as where a layer is called by itself, it runs the whole product and takes its own rows: right, but it
pays for the others' rows too, since prepared layouts do not come apart by rows. A compiler that looks through the
calls sees one operator, its slices, and no state left behind.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from sparsekit.backends import BACKENDS, resolve
from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec
from sparsekit.nn.replace import sparse_layers
from sparsekit.nn.sparse_linear import Share, SparseLinear

_QKV, _GATE_UP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_LLAMA_LIKE = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3", "Granite")
_BERT_LIKE = {"bert": "Bert", "roberta": "Roberta", "xlm_roberta": "XLMRoberta", "electra": "Electra"}


def _path(model: str, name: str) -> str:
    return f"transformers.models.{model}.modeling_{model}.{name}"


SAME_INPUT: dict[str, tuple[str, ...]] = {
    **{_path(family.lower(), f"{family}Attention"): _QKV for family in (*_LLAMA_LIKE, "Mixtral", "OPT")},
    **{_path(family.lower(), f"{family}MLP"): _GATE_UP for family in _LLAMA_LIKE},
    **{_path(model, f"{family}SelfAttention"): ("query", "key", "value") for model, family in _BERT_LIKE.items()},
    _path("distilbert", "DistilBertSelfAttention"): ("q_lin", "k_lin", "v_lin"),
}
"""Class of transformers, with its module -> the layers that its forward calls with the same tensor, which it does not
write to. Subclasses and classes of the same name from elsewhere, as from a checkpoint's own code, are not meant."""

ALIGNMENT = 16
"""Rows of each layer come in multiples of this, so that every slice of the product starts where vectors do."""


def fuse_(model: nn.Module) -> dict[str, str]:
    """Fuse the packed layers of `model` that read the same input, in the classes of `SAME_INPUT`.

    Layers behind an adapter (`base_layer`) are found too. Every layer of a group says in `fusion` what became of it.

    All or none, if it is interrupted.

    Returns:
        "parent: q_proj, k_proj, v_proj" -> why this group stays apart.
    """
    refused: dict[str, str] = {}
    made: list[FusedGroup] = []
    try:
        for parent_name, parent, names, layers in _groups(model):
            if any(layer.is_fused for layer in layers.values()):
                continue
            reason = next((f"{name} is not packed" for name in names if name not in layers), None)
            if reason is None:
                made.append(FusedGroup(names, tuple(layers[name] for name in names)))
                reason = made[-1].why_not()
            if reason is None:
                made[-1].fuse_()
                made[-1].attach_(parent)
            else:
                refused[f"{parent_name}: {', '.join(names)}"] = reason
                for layer in layers.values():
                    layer.fusion = f"apart: {reason}"
    except BaseException:
        for group in made:
            group.disband_()
        raise
    return refused


def disband_broken_groups_(model: nn.Module) -> None:
    """Let the layers of `model` stand alone that were fused with one that is no longer in it."""
    layers = {id(layer): layer for layer in sparse_layers(model).values()}
    for layer in layers.values():
        if layer.group is not None and not all(id(member) in layers for member in layer.group.members):
            layer.group.disband_()
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            bracket = getattr(hook, "__self__", None)
            if isinstance(bracket, _Bracket) and not any(id(member) in layers for member in bracket.group.members):
                bracket.remove_()


def _groups(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[str, ...], dict[str, SparseLinear]]]:
    """Yield (name of the parent, the parent, names of the layers of a group, those of them that are packed)."""
    for parent_name, parent in model.named_modules():
        kind = type(parent)
        names = SAME_INPUT.get(f"{kind.__module__}.{kind.__qualname__}", ())
        children = {name: getattr(parent, name, None) for name in names}
        layers = {name: getattr(child, "base_layer", child) for name, child in children.items()}
        packed = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}
        if packed:
            yield parent_name, parent, names, packed


class _Product(NamedTuple):
    """What the first layer called has left for the others.

    Attributes:
        source: the tensor that it was called with; None where none was called yet.
        state: all else that the product depends on.
        y: [..., N of all layers].
        waiting: indices of the layers that have not taken theirs.
    """

    source: Tensor | None
    state: tuple[object, ...]
    y: Tensor | None
    waiting: tuple[int, ...]


_NOTHING_YET = _Product(None, (), None, ())


class _Scope(threading.local):
    """A thread's own: None outside of the parent's forward, else what its layers share."""

    product: _Product | None = None


class _Bracket:
    """The hooks that open a group's scope before each forward of the parent, and close it after.

    The parent holds it through its hooks, so copies of the parent have a bracket of their own around their own group.
    """

    def __init__(self, group: "FusedGroup", parent: nn.Module) -> None:
        self.group = group
        opening = parent.register_forward_pre_hook(self.open)
        closing = parent.register_forward_hook(self.close, prepend=True, always_call=True)
        self.handles = (opening, closing)
        self.opening, self.closing = opening.id, closing.id  # a compiler does not look into handles
        group.bracket = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.group.bracket = weakref.ref(self)

    def open(self, parent: nn.Module, inputs: object) -> None:
        self.group.product = _NOTHING_YET if self._nothing_in_between(parent) else None

    def close(self, parent: nn.Module, inputs: object, output: object) -> None:
        self.group.product = None

    def remove_(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _nothing_in_between(self, parent: nn.Module) -> bool:
        """Whether no code but the class's own runs while the scope is open."""
        before, after = list(parent._forward_pre_hooks), list(parent._forward_hooks)
        if _global_forward_pre_hooks or _global_forward_hooks:
            return False
        if not before or before[-1] != self.opening or not after or after[0] != self.closing:
            return False
        if "forward" in parent.__dict__ or type(parent).forward.__module__ != type(parent).__module__:
            return False
        layers = [parent._modules.get(name) for name in self.group.names]
        known = [isinstance(layer, SparseLinear) or type(layer).__module__.startswith("peft.") for layer in layers]
        return all(known) and _is_unhooked_within(parent)


def _is_unhooked_within(parent: nn.Module) -> bool:
    for module in parent._modules.values():
        if module is None:
            continue
        if module._forward_pre_hooks or module._forward_hooks or "forward" in module.__dict__:
            return False
        if module._modules and not _is_unhooked_within(module):
            return False
    return True


class FusedGroup:
    """Layers run by one product. It is whole, or it is dissolved and its layers stand alone.

    The layers know the group, so it knows them weakly: a deleted model is freed at once. One that is gone (its place
    was given to another module, or a copy was made of one layer alone) leaves the others right, but each on its own.

    Args:
        names: of the layers, as their parent calls them.
        members: the layers.
    """

    def __init__(self, names: tuple[str, ...], members: tuple[SparseLinear, ...]) -> None:
        self.names, self._members = names, tuple(weakref.ref(layer) for layer in members)
        self.bracket: weakref.ref[_Bracket] | None = None
        self._scope = _Scope()
        self._compiled: _Product | None = None

    @property
    def product(self) -> _Product | None:
        """What the members share just now; None outside of a forward of their parent.

        A compiler does not look into what is a thread's own. It needs not: there all of this happens as it traces.
        """
        return self._compiled if torch.compiler.is_compiling() else self._scope.product

    @product.setter
    def product(self, product: _Product | None) -> None:
        if torch.compiler.is_compiling():
            self._compiled = product
        else:
            self._scope.product = product

    @property
    def members(self) -> tuple[SparseLinear, ...]:
        """The layers; fewer than `names` once one is gone."""
        layers = [member() for member in self._members]
        return tuple([layer for layer in layers if layer is not None])

    def __getstate__(self) -> dict[str, object]:
        return {"names": self.names, "members": self.members}  # a product with a gradient has no copy

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def why_not(self) -> str | None:
        """Return why these layers cannot be one, in a sentence, or None if they can."""
        if len(self.members) < len(self.names):
            return f"one of {', '.join(self.names)} is gone"
        first, *others = self.members
        for name, layer in zip(self.names, self.members, strict=True):
            if layer.out_features % ALIGNMENT:
                return f"{name} has {layer.out_features} rows, which is no multiple of {ALIGNMENT}"
            shapes = FORMATS.get(layer.format).parts(layer.spec).values()
            if any(shape[0] != layer.out_features for shape, _ in shapes):
                return f"{layer.format} does not hold one row after the other"
        for name, layer in zip(self.names[1:], others, strict=True):
            if replace(layer.spec, out_features=first.out_features) != first.spec:
                return f"{name} is {layer.spec}, {self.names[0]} is {first.spec}"
            if layer.device != first.device:
                return f"{name} is on {layer.device}, {self.names[0]} on {first.device}"
            if (layer.bias is None) != (first.bias is None):
                return f"of {name} and {self.names[0]} only one has a bias"
            if (layer.requested_backend, layer.prefill) != (first.requested_backend, first.prefill):
                return f"{name} and {self.names[0]} were packed with other options"
        if first.device.type == "meta":
            return "they are on the meta device"
        for name, layer in zip(self.names[1:], others, strict=True):
            if not layer.reads_like(first):
                return f"the side branches of {name} and {self.names[0]} do not read the same"
        try:
            resolve(first.requested_backend, self._spec(), first.device, first.prefill)
        except Unsupported as error:
            return str(error)
        return None

    def attach_(self, parent: nn.Module) -> None:
        """Let the members share a product within each forward of `parent`; until then, each computes it anew."""
        _Bracket(self, parent)

    def fuse_(self) -> bool:
        """Make the members one, and return True; or return False where `why_not` has a reason.

        Raises:
            CheckpointError: the canonical tensors of a member are not a legal weight.
        """
        if self.why_not() is not None:
            return False
        first = self.members[0]
        parts = [layer.packed() for layer in self.members]
        for layer, packed in zip(self.members, parts, strict=True):
            if not layer.is_prepared:
                FORMATS.get(layer.format).validate(packed)
        spec = self._spec()
        stacked = {name: torch.cat([packed.tensors[name] for packed in parts]) for name in parts[0].tensors}
        chosen, reasons = resolve(first.requested_backend, spec, first.device, first.prefill)
        prepared = chosen.prepare(PackedWeight(spec, stacked), first.prefill)
        first_row = 0
        for index, layer in enumerate(self.members):
            layer._set_canonical(parts[index])  # drops what it had prepared for itself
            layer._set_prepared(prepared, chosen.name, Share(self, index, first_row, spec))
            layer.reasons, layer.group = reasons, self
            layer.fusion = "with " + ", ".join(name for name in self.names if name != self.names[index])
            first_row += layer.out_features
        self._close()
        return True

    def dissolve_(self) -> None:
        """Give every member its own canonical tensors; those that run again before `fuse_` prepare them alone."""
        parts = [layer.packed() for layer in self.members]
        for layer, packed in zip(self.members, parts, strict=True):
            layer._set_canonical(packed)
        self._close()

    def disband_(self) -> None:
        """Dissolve for good; each layer is prepared for itself."""
        self.dissolve_()
        bracket = None if self.bracket is None else self.bracket()
        if bracket is not None:
            bracket.remove_()
        for layer in self.members:
            layer.group, layer.fusion = None, ""
            layer.prepare_()

    def share_(self, buffers: dict[str, Tensor | None]) -> None:
        """Let all members hold these prepared tensors."""
        for layer in self.members:
            layer._buffers.update(buffers)
        self._close()

    def _close(self) -> None:
        """Close the scopes of all threads: what they share is of a weight that was."""
        self._scope, self._compiled = _Scope(), None

    def linear(self, layer: SparseLinear, share: Share, x: Tensor, source: Tensor) -> Tensor:
        """Return x @ W.T + bias of one member.

        Args:
            layer: the member, or a replica of it that data parallelism made.
            share: its part.
            x: [..., K] in the weight's dtype.
            source: the tensor that the layer was called with: x, before autocast.
        """
        members = self.members
        if len(members) < len(self.names) or members[share.index] is not layer:  # the others' biases are not at hand
            before, after = share.first_row, share.spec.out_features - share.first_row - layer.out_features
            padded = None if layer.bias is None else F.pad(layer.bias, (before, after))
            y = self._multiply(layer, share, x, padded)
        else:
            own = [member.own_bias() for member in members]
            biases = [bias for bias in own if bias is not None]
            y = self._shared(layer, share, x, source, biases)
        return y.narrow(-1, share.first_row, layer.out_features)

    def _shared(self, layer: SparseLinear, share: Share, x: Tensor, source: Tensor, biases: list[Tensor]) -> Tensor:
        """Return the product for all members: another's, if there is one for this call, else a new one."""
        product = self.product
        if product is None:
            return self._multiply(layer, share, x, self._joined(biases))
        state = _state(source, biases)
        if product.y is not None and product.source is source and product.state == state:
            if share.index in product.waiting:
                waiting = tuple([index for index in product.waiting if index != share.index])
                self.product = product._replace(waiting=waiting) if waiting else _NOTHING_YET
                return product.y
        y = self._multiply(layer, share, x, self._joined(biases))
        others = tuple([index for index in range(len(self.names)) if index != share.index])
        self.product = _Product(source, state, y, others)
        return y

    def _multiply(self, layer: SparseLinear, share: Share, x: Tensor, bias: Tensor | None) -> Tensor:
        op, spec = BACKENDS.get(layer.backend).op(share.spec.format), share.spec
        return op.linear(layer.extended(x), layer.prepared, bias, spec.out_features, spec.in_features)

    def _joined(self, biases: list[Tensor]) -> Tensor | None:
        """All biases, one after the other. Concatenated at each call: a copy could not know of `bias.data.copy_`."""
        if len(biases) not in (0, len(self.names)):
            raise RuntimeError(f"a bias of {', '.join(self.names)} was taken away or added: pack the model again")
        return torch.cat(biases) if biases else None

    def _spec(self) -> WeightSpec:
        return replace(self.members[0].spec, out_features=sum(layer.out_features for layer in self.members))


def _state(source: Tensor, biases: Sequence[Tensor]) -> tuple[object, ...]:
    """Return what must be the same for a product to be right for another member, as far as it can be known."""
    grad = torch.is_grad_enabled()
    read = [source, *biases]
    if torch.compiler.is_compiling() or any([tensor.is_inference() for tensor in read]):
        return (grad,)
    return grad, *[(id(tensor), tensor._version) for tensor in read]
