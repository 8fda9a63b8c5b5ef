"""The teacher in memory: it hands over its last hidden states with its head, so that its logits are never there whole.

Under autocast linear layers multiply in 16 bits, and cast their weights in each forward. A copy that is made to teach
there (`teaching_copy`) holds these weights cast: half the bytes, and the same words, bit for bit.

A cache of what it said, which takes its place, is in `teacher_cache`.
"""

import copy
import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.targets import is_conv1d
from sparsekit.train.distill import Head


@dataclass(frozen=True)
class OutputHead:
    """From last hidden states to logits, as the model's own forward does it.

    Attributes:
        linear: the output embedding.
        scale: factor of its logits (Cohere, Granite, Falcon-H1).
        softcap: c in c * tanh(logits / c) (Gemma), or None.
        autocast: device type, and the dtype to compute in, or None for that of the weights.
    """

    linear: nn.Module
    scale: float = 1.0
    softcap: float | None = None
    autocast: tuple[str, torch.dtype | None] = ("cpu", None)

    def __call__(self, hidden: Tensor) -> Tensor:
        device_type, dtype = self.autocast
        with torch.autocast(device_type, dtype=dtype, enabled=dtype is not None):
            logits = self.linear(hidden)
            if self.scale != 1:
                logits = logits * self.scale
            return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


class Teacher(nn.Module):
    """A frozen model that stays in eval mode whatever it is part of.

    Args:
        model: a causal language model; its parameters are frozen in place, so pass a copy of a model that trains on.
            Models of transformers whose logits are made of their base model's hidden states by the output embedding,
            scaled or soft-capped, are split there; that this gives the model's own logits is checked in the first
            call. Others give whole logits, and a warning says so.
        freezes: False leaves the model as it is, for one that is student and teacher in turn; who calls then puts it in
            eval mode.
    Attributes:
        hidden_states: of the last call, if asked for: the embedding, then the output of each block [B, L, d].
    """

    def __init__(self, model: nn.Module, freezes: bool = True) -> None:
        super().__init__()
        self.model = model.requires_grad_(False) if freezes else model
        self.hidden_states: tuple[Tensor, ...] = ()
        self._takes = inspect.signature(model.forward).parameters
        self._head = _output_head(model)
        self._is_head_checked = False
        if freezes:
            self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode."""
        return super().train(False)

    def get_input_embeddings(self) -> nn.Module:
        model: Any = self.model
        return model.get_input_embeddings()

    def outputs(self, batch: Mapping[str, Any], output_hidden_states: bool = False) -> Head | Tensor:
        """Return what `distillation_loss` takes as teacher for a batch; `labels` and `teacher_...` are not read.

        Raises:
            ValueError: hidden states are asked of a model that does not return them.
        """
        inputs = {key: value for key, value in batch.items() if key != "labels" and not key.startswith("teacher_")}
        inputs |= {"use_cache": False} if "use_cache" in self._takes else {}
        inputs |= {"output_hidden_states": True} if output_hidden_states else {}
        taught: Head | Tensor | None
        with torch.no_grad():
            taught, output = self._split(inputs) if self._head is not None else (None, None)
            if taught is None:
                output = self.model(**inputs)
                taught = _first(output, "logits")
        hidden_states = getattr(output, "hidden_states", None)
        if output_hidden_states and hidden_states is None:
            raise ValueError(f"{type(self.model).__name__} returns no hidden states: match logits alone")
        self.hidden_states = tuple(hidden_states or ())
        return taught

    def _split(self, inputs: dict[str, Any]) -> tuple[Head | None, Any]:
        """Return the head and its input, with the model's output; None, and say so, where that is not the model's way.

        The whole model is called, so that whatever wraps it (sharding, offloading) takes part, but for one logit.
        """
        assert self._head is not None
        seen: list[Tensor] = []
        hooks = [
            base.register_forward_hook(lambda module, args, output: seen.append(_first(output, "last_hidden_state")))
            for base in _bases(self.model)
        ]
        try:
            output = self.model(**inputs, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        device_type = output.logits.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
        head = replace(self._head, autocast=(device_type, dtype))
        if not self._is_head_checked:
            if not seen or not _is_close(head(seen[-1][:, -1:]), output.logits):
                _warn_of_whole_logits(self.model, "makes its logits in a way of its own", stacklevel=3)
                self._head = None
                return None, None
            self._is_head_checked = True
        return Head(seen[-1], head), output


def teaching_copy(model: nn.Module, autocast: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model that is about to train, to teach it.

    Args:
        autocast: dtype of the autocast that the copy will run under; its linear layers hold their parameters in it,
            but for those that another layer has, too, as an embedding that is tied to the output. None for a copy as
            it is.
    """
    cast: dict[int, Any] = {}
    if autocast is not None:
        linear = [module for module in model.modules() if type(module) is nn.Linear or is_conv1d(module)]
        others = {
            id(parameter)
            for module in set(model.modules()) - set(linear)
            for parameter in module.parameters(recurse=False)
        }
        cast = {
            id(parameter): nn.Parameter(parameter.detach().to(autocast), requires_grad=False)
            for module in linear
            for parameter in module.parameters(recurse=False)
            if parameter.dtype == torch.float32 and id(parameter) not in others
        }
    return copy.deepcopy(model, cast)  # what is in the memo is taken for the copy


def _output_head(model: nn.Module) -> OutputHead | None:
    """Return what makes logits of the last hidden states; None, and say so, where the model cannot be split."""
    get_head = getattr(model, "get_output_embeddings", None)
    linear = get_head() if callable(get_head) else None
    if linear is None or not _bases(model) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        _warn_of_whole_logits(model, "has no base model with an output embedding", stacklevel=4)
        return None
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config

    def setting(*names: str) -> float | None:
        values = (getattr(config, name, None) for name in names)
        return next((float(value) for value in values if isinstance(value, int | float)), None)

    scale = (setting("logit_scale", "lm_head_multiplier") or 1.0) / (setting("logits_scaling") or 1.0)
    return OutputHead(linear, scale, setting("final_logit_softcapping", "logits_soft_cap"))


def _bases(model: nn.Module) -> list[nn.Module]:
    """Return the parts of a model of which the last to finish returns the last hidden states; OPT calls the inner."""
    get_decoder = getattr(model, "get_decoder", None)
    found = [getattr(model, "base_model", None), get_decoder() if callable(get_decoder) else None]
    return [base for base in found if isinstance(base, nn.Module) and base is not model]


def _warn_of_whole_logits(model: nn.Module, why: str, stacklevel: int) -> None:
    warnings.warn(
        f"{type(model).__name__} {why}: the teacher's logits are computed for a whole batch at a time, which takes "
        "more memory",
        stacklevel=stacklevel + 1,
    )


def _first(output: Any, name: str) -> Tensor:
    """Return the tensor `name` of a model's output, or the first one of a tuple, or the output."""
    found = output if isinstance(output, Tensor) else getattr(output, name, None)
    return output[0] if found is None else found


def _is_close(logits: Tensor, expected: Tensor) -> bool:
    """Whether logits agree to what another order of summation (or TF32) may change. NaN is not what is asked here."""
    if logits.shape != expected.shape:
        return False
    limit = max(2e-3, 4 * torch.finfo(expected.dtype).eps) * expected.float().abs().max()
    return not bool(((logits.float() - expected.float()).abs() > limit).any())
