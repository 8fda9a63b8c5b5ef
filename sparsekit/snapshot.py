"""All or nothing: the weights as they were, for when something fails half-way."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.hf.describe import describe_packed_
from sparsekit.interrupt import uninterrupted
from sparsekit.nn import SideLinear, SparseLinear, replace_layer_, set_parameters_, side_layers, sparse_layers
from sparsekit.nn.side import without_branch
from sparsekit.pack import replace_by_dense_

_ABSENT = object()


class Snapshot:
    """Copies, on the CPU, of weights about to change; and how to take back what changes the model's shape."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._packed_before, self._branched_before = set(sparse_layers(model)), set(side_layers(model))
        self._parameters: dict[str, dict[str, Tensor]] = {}
        self._undo: list[Callable[[], None]] = []
        self._held: list[nn.Parameter] = []

    def remember(self, name: str, layer: nn.Module | None = None) -> None:
        """Keep the weight and bias of the layer `name` as they are now; the first call for a layer counts.

        Args:
            layer: where another module stands in its place for now, as an adapter does.
        """
        if name not in self._parameters:
            own = (self.model.get_submodule(name) if layer is None else layer).named_parameters(recurse=False)
            self._parameters[name] = {key: parameter.detach().to("cpu", copy=True) for key, parameter in own}

    def set_parameters_(self, name: str, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        """Give the dense layer `name` another weight and bias, of any sizes.

        The old ones are freed unless somebody else holds them; then they are the ones that come back.
        """
        self.remember(name)
        layer, copies = self.model.get_submodule(name), self._parameters[name]
        old = {
            key: None if parameter is None else (weakref.ref(parameter), parameter.device, parameter.requires_grad)
            for key, parameter in layer._parameters.items()
        }

        def put_back(key: str) -> nn.Parameter | None:
            if (entry := old[key]) is None:
                return None
            known, device, requires_grad = entry
            parameter = known()
            return nn.Parameter(copies[key].to(device), requires_grad) if parameter is None else parameter

        def undo() -> None:
            # By name: the layer may have been packed, and be another module by now.
            restored = put_back("weight")
            assert restored is not None
            set_parameters_(self.model.get_submodule(name), restored, put_back("bias") if "bias" in old else None)

        set_parameters_(layer, weight, bias)
        self._undo.append(undo)

    def set_branch_(self, name: str, S: Tensor, X: Tensor | None) -> None:
        """Give the side branch of the layer `name` other factors, of any sizes."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, SideLinear)
        old = layer.side_S, layer.side_X

        def undo() -> None:
            layer.side_S, layer.side_X = old

        def own(x: Tensor) -> nn.Parameter:
            return x if isinstance(x, nn.Parameter) else nn.Parameter(x.contiguous(), old[0].requires_grad)

        layer.side_S, layer.side_X = own(S), None if X is None else own(X)
        self._undo.append(undo)

    def hold(self, parameter: nn.Parameter) -> None:
        """Let a parameter live, though nobody else may hold it: one that stands in several places is then one again."""
        self._held.append(parameter)

    def keep_(self, owner: Any, attribute: str) -> None:
        """Keep an attribute of a module or a config as it is now, or its absence."""
        old = vars(owner).get(attribute, _ABSENT)

        def undo() -> None:
            if old is not _ABSENT:
                setattr(owner, attribute, old)
            elif attribute in vars(owner):
                delattr(owner, attribute)

        self._undo.append(undo)

    def choose_children_(self, name: str, kept: list[int]) -> None:
        """Leave these children in the list of modules `name`, counted anew; the others go."""
        children = self.model.get_submodule(name)._modules
        old = dict(children)
        prefix = f"{name}." if name else ""
        places = {f"{prefix}{list(old)[index]}": f"{prefix}{place}" for place, index in enumerate(kept)}

        def undo() -> None:
            children.clear()
            children.update(old)
            self._rename({new: name for name, new in places.items()}, prefix)
            self._parameters |= gone

        modules = list(old.values())
        children.clear()
        children.update({str(place): modules[index] for place, index in enumerate(kept)})
        gone = self._rename(places, prefix)
        self._undo.append(undo)

    def _rename(self, places: Mapping[str, str], prefix: str) -> dict[str, dict[str, Tensor]]:
        """Follow blocks under `prefix` to their new places; return what was remembered of those that have none."""

        def renamed(name: str) -> str | None:
            if not name.startswith(prefix):
                return name
            block, dot, rest = name.removeprefix(prefix).partition(".")
            place = places.get(f"{prefix}{block}")
            return None if place is None else f"{place}{dot}{rest}"

        gone = {name: copies for name, copies in self._parameters.items() if renamed(name) is None}
        self._parameters = {
            new: copies for name, copies in self._parameters.items() if (new := renamed(name)) is not None
        }
        self._packed_before = {new for name in self._packed_before if (new := renamed(name)) is not None}
        self._branched_before = {new for name in self._branched_before if (new := renamed(name)) is not None}
        return gone

    def originals(self) -> dict[str, Tensor]:
        """Return the remembered parameters by qualified name, on the CPU, as they were."""
        return {
            f"{name}.{key}" if name else key: tensor
            for name, parameters in self._parameters.items()
            for key, tensor in parameters.items()
        }

    def restore(self) -> None:
        """Turn layers packed since back into dense ones, take away side branches put there since, and put every
        remembered parameter back, bit for bit; and what changed the model's shape is taken back, the last first."""
        packed_since = [name for name in sparse_layers(self.model) if name not in self._packed_before]
        replace_by_dense_(self.model, packed_since)
        for name, side in side_layers(self.model).items():
            if name not in self._branched_before:
                replace_layer_(self.model, name, without_branch(side))
        if self._undo:
            while self._undo:
                self._undo.pop()()
            describe_packed_(self.model)
        for name, parameters in self._parameters.items():
            layer = self.model.get_submodule(name)
            assert not isinstance(layer, SparseLinear)
            with torch.no_grad():
                for key, tensor in parameters.items():
                    layer.get_parameter(key).copy_(tensor)


_open: ContextVar[Snapshot | None] = ContextVar("sparsekit_snapshot", default=None)


@contextmanager
def restored_on_failure(model: nn.Module) -> Iterator[Snapshot]:
    """Yield a snapshot to fill; whatever ends the body early, Ctrl-C too, the model is put back.

    Inside another such block for the same model, that block's snapshot is used: one copy of the weights, not two.
    """
    outer = _open.get()
    if outer is not None and outer.model is model:
        yield outer
        return
    snapshot = Snapshot(model)
    token = _open.set(snapshot)
    try:
        yield snapshot
    except BaseException:
        with uninterrupted():
            snapshot.restore()
        raise
    finally:
        _open.reset(token)


@contextmanager
def put_back_afterwards(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Put the parameters of these layers back, as they are now, whatever happens in the body.

    For the body the model is what it makes of it: a block of `restored_on_failure` in there starts from that.
    """
    snapshot = Snapshot(model)
    for name in names:
        snapshot.remember(name)
    token = _open.set(None)
    try:
        yield
    finally:
        _open.reset(token)
        with uninterrupted():
            snapshot.restore()
