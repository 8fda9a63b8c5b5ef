"""How far a model's answers are from those it gave before, without labels."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.calibration.samples import Batch
from sparsekit.methods.structured.watch import Tokens, first_tensor

_OF_POSITIONS = ("start_logits", "end_logits")
"""Logits [samples, tokens] that choose a token of each sample."""
_NEVER = -1e4
"""Logit of what is not there to be chosen; finite, so that divergences are."""


class Answers:
    """What a model said on some batches, to compare with.

    Logits are compared by KL(before ‖ now) in nats, for each token or sample; those of several heads add up. A
    regression (one logit), and the hidden states of a model without a head, are compared by |now - before|², relative
    to the variance of what was before.
    """

    def __init__(self) -> None:
        self._before: dict[int, dict[str, Tensor]] = {}
        self._tokens: dict[int, Tokens] = {}

    def remember(self, index: int, batch: Batch, output: Any) -> None:
        """Keep the answers to one batch."""
        self._tokens[index] = Tokens.of(batch)
        self._before[index] = self._rows(index, output)

    @property
    def indices(self) -> list[int]:
        """Which batches are remembered."""
        return list(self._before)

    @torch.no_grad()
    def divergence(self, index: int, output: Any) -> tuple[float, int]:
        """Return the sum of divergences over the tokens (or samples) of one batch, and their number."""
        answers = self._rows(index, output)
        means = [_divergence(before, answers[name], name) for name, before in self._before[index].items()]
        num = len(next(iter(answers.values())))
        return num * sum(means), num

    def _rows(self, index: int, output: Any) -> dict[str, Tensor]:
        """Return the answers by name, fp32 [M, C], without those at padding."""
        tokens, found = self._tokens[index], {}
        for name, answers in _answers(output).items():
            if name in _OF_POSITIONS:
                for mask in tokens.masks:
                    if mask.shape == answers.shape:
                        answers = answers.masked_fill(mask.to(answers.device) == 0, _NEVER)
                found[name] = answers.float()
            else:
                found[name] = tokens.pick(answers).float()
        return found


def _answers(output: Any) -> dict[str, Tensor]:
    """Return the logits of a model's output by name, or else its hidden states."""
    fields = output if isinstance(output, Mapping) else vars(output) if hasattr(output, "__dict__") else {}
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    for chosen in (["logits"], [n for n in tensors if n.endswith("_logits")], ["last_hidden_state"]):
        if chosen and tensors.keys() >= set(chosen):
            return {name: tensors[name] for name in chosen}
    return {"": first_tensor(output)}


def _divergence(before: Tensor, now: Tensor, name: str) -> float:
    """Return the mean over rows of how far answers [M, C] have gone."""
    if name.endswith("logits") and before.shape[-1] > 1:
        total = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
        return float(total) / max(len(now), 1)
    spread = float((before - before.mean(dim=0)).square().sum()) / max(len(before), 1) or 1.0
    return float((now - before).square().sum()) / spread / max(len(now), 1)
