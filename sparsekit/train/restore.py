"""All or nothing for training: the whole model as it was, for when a run fails half-way."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparsekit.interrupt import uninterrupted

_CONTENT = ("_parameters", "_buffers", "_modules")


class Kept:
    """What a model was before training: its modules and their attributes, and where its values can be had.

    Args:
        model: the model about to be trained.
        twin: what holds the same values as long as training lasts: a frozen copy, as a teacher is, or the model itself
            where training changes none. What it lacks, or holds in another dtype, is copied to the CPU; so is all
            where there is none.
    """

    def __init__(self, model: nn.Module, twin: nn.Module | None = None) -> None:
        self._model, self._twin = model, twin
        self._attributes = [
            (module, {name: (value, _content(value)) for name, value in vars(module).items()})
            for module in model.modules()
        ]
        self._wants_gradient = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        configs = (getattr(model, name, None) for name in ("config", "generation_config"))
        self._configs = [(config, copy.deepcopy(vars(config))) for config in configs if hasattr(config, "__dict__")]
        held = {} if twin is None else twin.state_dict()
        self._copied = {
            name: value.detach().to("cpu", copy=True)
            for name, value in model.state_dict().items()
            if name not in held or held[name].dtype != value.dtype
        }

    def restore_(self) -> None:
        """Put modules, values, gradients wanted, modes and settings back."""
        self._put_back(())
        for parameter, wanted in self._wants_gradient:
            parameter.requires_grad_(wanted)
        values = {**({} if self._twin is None else self._twin.state_dict()), **self._copied}
        with torch.no_grad():
            for name, value in self._model.state_dict().items():
                value.copy_(values[name])
        self._model.zero_grad(set_to_none=True)

    def restore_settings_(self) -> None:
        """Put back all but weights and layers: hooks, wrapped forwards, checkpointing, modes, the model's config."""
        self._put_back(_CONTENT)
        known = {id(module) for module, _ in self._attributes}
        for module in self._model.modules():
            if id(module) not in known:
                module.training = self._model.training

    def _put_back(self, but: tuple[str, ...]) -> None:
        for module, saved in self._attributes:
            now = vars(module)
            for name in now.keys() - saved.keys():
                del now[name]
            for name, (value, content) in saved.items():
                if name in but:
                    continue
                if content is not None:  # in place: the handles of hooks remember the dict that they are in
                    value.clear()
                    value.update(content)
                now[name] = value
        for config, settings in self._configs:
            vars(config).clear()
            vars(config).update(settings)


@contextmanager
def restored_whole_on_failure(model: nn.Module, twin: nn.Module | None = None) -> Iterator[None]:
    """Let the body train `model`; whatever ends it early, Ctrl-C too, the model is put back, bit for bit.

    Where all goes well, weights and layers alone have changed: what a trainer left on the model is taken off again.

    Args:
        twin: what holds the model's values as long as the body runs, see `Kept`.
    """
    kept = Kept(model, twin)
    try:
        yield
    except BaseException:
        with uninterrupted():
            kept.restore_()
        raise
    kept.restore_settings_()


def _content(value: Any) -> Any:
    return value.copy() if isinstance(value, dict | set) else None
