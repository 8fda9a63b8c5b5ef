"""How far a model's answers are from those it gave before, without labels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.calibration.samples import Batch
from sparsekit.methods.structured.watch import Tokens


class Answers:
    """What a model said on some batches, to compare with.

    Logits are compared by KL(before ‖ now) in nats, for each token or sample. A regression (one logit), and the hidden
    states of a model without a head, are compared by |now - before|², relative to the variance of what was before.
    """

    def __init__(self) -> None:
        self._before: dict[int, Tensor] = {}
        self._tokens: dict[int, Tokens] = {}
        self.is_classification = False

    def remember(self, index: int, batch: Batch, output: Any) -> None:
        """Keep the answers to one batch."""
        self._tokens[index] = Tokens.of(batch)
        logits = getattr(output, "logits", None)
        self.is_classification = isinstance(logits, Tensor) and logits.shape[-1] > 1
        self._before[index] = self._rows(index, output)

    @property
    def indices(self) -> list[int]:
        """Which batches are remembered."""
        return list(self._before)

    @torch.no_grad()
    def divergence(self, index: int, output: Any) -> tuple[float, int]:
        """Return the sum of divergences over the tokens (or samples) of one batch, and their number."""
        before, now = self._before[index], self._rows(index, output)
        if self.is_classification:
            total = F.kl_div(now.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True)
            return float(total), len(now)
        spread = float((before - before.mean(dim=0)).square().sum()) / len(before) or 1.0
        return float((now - before).square().sum()) / spread, len(now)

    def _rows(self, index: int, output: Any) -> Tensor:
        """Return the answers as fp32 [M, C], without those at padding."""
        found = next(
            (
                each
                for name in ("logits", "last_hidden_state")
                if isinstance(each := getattr(output, name, None), Tensor)
            ),
            None,
        )
        answers = output[0] if found is None and isinstance(output, tuple) else output if found is None else found
        return self._tokens[index].pick(answers).float()
