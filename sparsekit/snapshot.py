"""All or nothing: the weights as they were, for when something fails half-way."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from sparsekit.interrupt import uninterrupted
from sparsekit.nn import SparseLinear, replace_layer_, side_layers, sparse_layers
from sparsekit.nn.side import without_branch
from sparsekit.pack import replace_by_dense_


class Snapshot:
    """Copies, on the CPU, of weights about to change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._packed_before, self._branched_before = set(sparse_layers(model)), set(side_layers(model))
        self._parameters: dict[str, dict[str, Tensor]] = {}

    def remember(self, name: str) -> None:
        """Keep the weight and bias of the layer `name` as they are now; the first call for a layer counts."""
        if name not in self._parameters:
            own = self.model.get_submodule(name).named_parameters(recurse=False)
            self._parameters[name] = {key: parameter.detach().to("cpu", copy=True) for key, parameter in own}

    def originals(self) -> dict[str, Tensor]:
        """Return the remembered parameters by qualified name, on the CPU, as they were."""
        return {
            f"{name}.{key}" if name else key: tensor
            for name, parameters in self._parameters.items()
            for key, tensor in parameters.items()
        }

    def restore(self) -> None:
        """Turn layers packed since back into dense ones, take away side branches put there since, and put every
        remembered parameter back, bit for bit."""
        packed_since = [name for name in sparse_layers(self.model) if name not in self._packed_before]
        replace_by_dense_(self.model, packed_since)
        for name, side in side_layers(self.model).items():
            if name not in self._branched_before:
                replace_layer_(self.model, name, without_branch(side))
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
