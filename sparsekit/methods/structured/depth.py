"""Depth: whole blocks go, those that change the residual stream or the answers least.

- Influence (ShortGPT, arXiv 2403.03853, eq. 1): BI_i = 1 - E_t cos(x_i, x_i+1), x_i being the input of block i. One
  pass; all blocks are judged in the dense model. Of blocks in a row: 1 - E_t cos(x_i, x_i+n) (arXiv 2403.17887, eq. 6).
- Perplexity (Shortened LLaMA, arXiv 2402.02834): how much worse the model answers without a block. Greedily, one block
  after the other, each time in the model without those that went; a pass over the data for each block that is tried.
  For models that predict no next token, it is the divergence from the dense model's answers.

What is left is as wide as before, and its cache shorter; but blocks are coarse, and generation suffers more than
multiple choice shows.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.errors import NonFiniteError
from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.base import StructuredMethod, check_choice
from sparsekit.methods.structured.divergence import Answers
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.watch import Tokens, first_tensor
from sparsekit.patterns import Depth as DepthPattern
from sparsekit.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Depth(StructuredMethod):
    """Dropping of blocks.

    Attributes:
        criterion: "perplexity" or "influence", see the module.
        contiguous: take out blocks in a row.
        protect_first, protect_last: so many blocks at either end stay (4 and 2 in Shortened LLaMA, of 32).
    """

    pattern: str = "depth"
    criterion: str = "perplexity"
    contiguous: bool = False
    protect_first: int = 0
    protect_last: int = 0

    name = "depth"
    kind = DepthPattern()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "criterion", ("perplexity", "influence"))
        for field in ("protect_first", "protect_last"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{field}={value!r} must be a whole number of at least 0")
        if not isinstance(self.contiguous, bool):
            raise ValueError(f"contiguous={self.contiguous!r} is neither True nor False")

    def choose(
        self,
        model: nn.Module,
        blocks: list[str],
        num_gone: int,
        batches: list[Batch],
        bar: Progress,
        staying: Collection[int] = (),
    ) -> list[int]:
        """Return which blocks go, ascending.

        Args:
            model: the dense model; left as it is.
            blocks: names of the blocks of one list.
            num_gone: how many go.
            batches: calibration data.
            bar: to show progress on.
            staying: blocks that cannot go.
        Raises:
            ValueError: so many cannot go.
            NonFiniteError: activations hold NaN or infinity.
        """
        free = [p for p in range(self.protect_first, len(blocks) - self.protect_last) if p not in staying]
        windows = {p: list(range(p, p + num_gone)) for p in free if {*range(p, p + num_gone)} <= {*free}}
        if num_gone > len(free) or (self.contiguous and not windows):
            raise ValueError(
                f"{num_gone} of {len(blocks)} blocks would have to go{' in a row' if self.contiguous else ''}, and "
                f"protect_first={self.protect_first}, protect_last={self.protect_last}, targets and ignore leave "
                f"{len(free)} to choose from: protect fewer"
            )
        with as_in_inference(model):
            if self.contiguous:
                if self.criterion == "influence":
                    costs = influences(model, blocks, num_gone, batches)
                    return windows[min(windows, key=lambda start: costs[start])]
                bar.expect(len(windows))
                judge = Judge(model, blocks, batches)
                return windows[min(windows, key=lambda start: judge.cost(windows[start], bar))]
            if self.criterion == "influence":
                costs = influences(model, blocks, 1, batches)
                return sorted(sorted(free, key=lambda block: costs[block])[:num_gone])
            bar.expect(sum(len(free) - num for num in range(num_gone)))
            judge = Judge(model, blocks, batches)
            gone: list[int] = []
            for _ in range(num_gone):
                gone.append(min((b for b in free if b not in gone), key=lambda block: judge.cost([*gone, block], bar)))
            return sorted(gone)


def influences(model: nn.Module, blocks: list[str], num: int, batches: list[Batch]) -> list[float]:
    """Return 1 - the mean cosine between the input of block i and what `num` blocks make of it, for each i.

    Raises:
        NonFiniteError: a block gave NaN or infinity.
    """
    states: dict[int, Tensor] = {}
    sums, count = torch.zeros(len(blocks) - num + 1, dtype=torch.float64), 0

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        states[0] = first_tensor((args, kwargs))

    def after(place: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[place + 1] = first_tensor(output)

        return hook

    with ExitStack() as hooks:
        first = model.get_submodule(blocks[0])
        hooks.callback(first.register_forward_pre_hook(before, with_kwargs=True).remove)
        for place, block in enumerate(blocks):
            hooks.callback(model.get_submodule(block).register_forward_hook(after(place)).remove)
        for batch in batches:
            run(model, batch)
            tokens = Tokens.of(batch)
            rows = [tokens.pick(states[place]).float() for place in range(len(blocks) + 1)]
            count += len(rows[0])
            for place in range(len(sums)):
                sums[place] += F.cosine_similarity(rows[place], rows[place + num], dim=-1).double().sum().cpu()
    if not bool(sums.isfinite().all()):
        raise NonFiniteError("blocks give NaN or infinity on the calibration data: check the model's weights")
    return [1 - float(each) / max(count, 1) for each in sums]


class Judge:
    """Tells how much worse a model answers without some of its blocks."""

    def __init__(self, model: nn.Module, blocks: list[str], batches: list[Batch]) -> None:
        self.model, self.blocks, self.batches = model, blocks, batches
        self.predicts = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        self.answers = Answers()
        if not self.predicts:
            for index, batch in enumerate(batches):
                self.answers.remember(index, batch, run(model, batch))

    @torch.no_grad()
    def cost(self, gone: list[int], bar: Progress) -> float:
        """Return the mean loss of the next token without these blocks, or the mean divergence of the answers."""
        bar.advance(0, f"without {', '.join(self.blocks[block] for block in gone)}")
        total, count = 0.0, 0
        with ExitStack() as stack:
            for block in gone:
                stack.enter_context(skipped(self.model.get_submodule(self.blocks[block])))
            for index, batch in enumerate(self.batches):
                output = run(self.model, batch)
                loss, num = self._loss(batch, output) if self.predicts else self.answers.divergence(index, output)
                total, count = total + loss, count + num
        bar.advance()
        return total / max(count, 1) if total == total else float("inf")

    def _loss(self, batch: Batch, output: Any) -> tuple[float, int]:
        """Return the summed cross entropy of all tokens but the first, without padding, and their number."""
        labels = batch["input_ids"].to(output.logits.device)
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"].to(labels.device) == 0, -100)
        labels = labels[:, 1:]
        logits = output.logits[:, :-1].flatten(0, 1).float()
        return float(F.cross_entropy(logits, labels.flatten(), reduction="sum")), int((labels != -100).sum())


@contextmanager
def skipped(block: nn.Module, example: Any = None) -> Iterator[None]:
    """Let a block give back what it is given, in a tuple if that is what it gives.

    Args:
        block: a block of a model.
        example: something that it gave; without one, it is run once more to see.
    """
    own = block.forward

    def pass_on(*args: Any, **kwargs: Any) -> Any:
        nonlocal example
        if example is None:
            example = own(*args, **kwargs)
        hidden = first_tensor((args, kwargs))
        return (hidden, *example[1:]) if isinstance(example, tuple) else hidden

    before = block.__dict__.get("forward")
    block.__dict__["forward"] = pass_on
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before


METHODS.register("depth", Depth)
