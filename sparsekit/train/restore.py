"""All or nothing for training: the whole model as it was, for when a run fails half-way."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparsekit.interrupt import uninterrupted
from sparsekit.nn import replace_layer_


class Kept:
    """What a model was before training: its modules, and where its values can be had."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = dict(model.named_modules())
        self._parameters = {
            name: {key: (value, value.requires_grad) for key, value in module._parameters.items() if value is not None}
            for name, module in self._modules.items()
        }
        self._training = {name: module.training for name, module in self._modules.items()}
        self._values = {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}

    def use(self, other: nn.Module) -> None:
        """Let a frozen copy of the model serve, so that there are not two."""
        state = other.state_dict()
        if state.keys() == self._values.keys():
            self._values = state

    def restore_(self) -> None:
        """Put modules, values, gradients wanted and modes back."""
        for name, module in self._modules.items():
            if name and self._model.get_submodule(name) is not module:
                replace_layer_(self._model, name, module)
            for key, (parameter, requires_grad) in self._parameters[name].items():
                module._parameters[key] = parameter.requires_grad_(requires_grad)
            module.training = self._training[name]
        with torch.no_grad():
            for name, value in self._model.state_dict().items():
                value.copy_(self._values[name])
        self._model.zero_grad(set_to_none=True)


@contextmanager
def restored_whole_on_failure(model: nn.Module) -> Iterator[Kept]:
    """Yield what the model was; whatever ends the body early, Ctrl-C too, it is put back."""
    kept = Kept(model)
    try:
        yield kept
    except BaseException:
        with uninterrupted():
            kept.restore_()
        raise
