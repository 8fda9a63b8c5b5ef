"""Turn the residual stream to its principal directions, and leave the strongest of them.

Alone, as SliceGPT does (`thin_alone_`); or before heads and channels go (`Thinner`). Then how many directions stay is
chosen together with these, by the same measure: how much the answers suffer on calibration data. The readers that are
refitted afterwards are fitted to the stream as it was, turned but whole, and so heal what its cut did.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import INPUT, Batch
from sparsekit.errors import Unsupported
from sparsekit.methods.structured.divergence import Answers
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.slicegpt import (
    SliceGPT,
    Stream,
    deaden_,
    hidden_size_for,
    is_tied,
    legal_hidden_sizes,
    principal_directions,
    rotate_,
)
from sparsekit.methods.structured.watch import first_tensor
from sparsekit.plan import Cut, Plan
from sparsekit.progress import Progress
from sparsekit.residual import check_thin
from sparsekit.snapshot import Snapshot
from sparsekit.targets import weight_NK

_MOST_OF_ROUNDING = 0.1
"""By which answers may change, relatively, where they should not; bfloat16 makes a few hundredths."""
_ROUND_TO = 8
"""Hidden sizes are a multiple of this at least: fewer make no matrix product faster."""
_MOST_UNTIED = 0.02
"""Of the model's parameters, what a head may have that needs a weight of its own for it, where nobody asked."""
_LEAST, _MOST_TRIED = 0.5, 9
"""Of the dimensions, how many stay at least beside other cuts, and how many sizes are tried."""


def thin_alone_(
    model: nn.Module,
    config: SliceGPT,
    plan: Plan,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    snapshot: Snapshot,
    bar: Progress,
) -> None:
    """Make the hidden dimensions that carry least dead, after a turn, and write those that stay into the plan."""
    stream = Stream.of(model)
    if left_out := left_out_layer(stream, layers):
        raise ValueError(
            f"targets and ignore leave out {left_out}, and method='slicegpt' turns what all blocks read and write: "
            "leave them at their defaults"
        )
    num_kept, what_is_left = hidden_size_for(model, config, stream, batches)
    if num_kept == _size(model, stream):
        return
    check_thin(model, stream.embedding, num_kept)
    bar.advance(0, "principal directions")
    Q = principal_directions(model, stream, batches)
    bar.advance()
    _turn_(model, stream, Q, plan, num_kept, batches[0], snapshot)
    deaden_(model, stream, num_kept)
    plan.notes.append(what_is_left)


class Thinner:
    """The residual stream of a model, and what it costs the answers to make it thinner.

    Args:
        model: dense, of a family whose residual stream can be turned.
        batches: calibration data.
        judges: which of them judge.
        round_to: the hidden size that is left is a multiple of this.
        turn: turn the stream first; else its last dimensions are those that go.

    Attributes:
        size, num_kept: dimensions, before and after.
        untied: parameters of the head that no longer shares the embedding's weight; 0 where it does not.
        losses: hidden size -> divergence of the answers, in falling order; that of `size` is 0.
    """

    def __init__(
        self, model: nn.Module, batches: list[Batch], judges: list[int], round_to: int, turn: bool = True
    ) -> None:
        self.model, self.batches = model, batches
        self.stream = Stream.of(model)
        self.size = self.num_kept = _size(model, self.stream)
        head = model.get_submodule(self.stream.head).get_parameter("weight")
        self.untied = head.numel() if is_tied(model, self.stream) else 0
        self._turned = not turn
        self._Q = (
            principal_directions(model, self.stream, batches) if turn else torch.eye(self.size, dtype=torch.float64)
        )
        self.losses = self._losses(judges, round_to)

    @staticmethod
    def refusal(model: nn.Module, layers: Mapping[str, nn.Module], thin: bool | None, measure: str) -> str | None:
        """Return why the stream of a model stays as it is; None if it may be made thinner.

        Args:
            layers: the targets.
            thin: as `Contribution.hidden`.
            measure: of the budget.
        """
        if thin is False:
            return "hidden=False"
        if measure == "ns":
            return "a budget in time knows the cost of heads and channels only"
        try:
            stream = Stream.of(model)
        except Unsupported as error:
            return str(error)
        if left_out := left_out_layer(stream, layers):
            return f"targets and ignore leave out {left_out}"
        head = model.get_submodule(stream.head).get_parameter("weight")
        params = sum(parameter.numel() for parameter in model.parameters())
        if thin is None and is_tied(model, stream) and head.numel() > _MOST_UNTIED * params:
            return f"{stream.head} shares its weight with {stream.embedding}, and could not go on doing so"
        return None

    def thin_(self, plan: Plan, snapshot: Snapshot) -> dict[str, Tensor]:
        """Turn the stream and make what goes of it dead; return the weights of the model turned but whole, by name,
        on the CPU."""
        check_thin(self.model, self.stream.embedding, self.num_kept)
        if self._turned:
            for name in (self.stream.embedding, self.stream.head, *self.stream.linears):
                snapshot.remember(name)
            _write_down(self.model, self.stream, plan, self.num_kept)
        else:
            _turn_(self.model, self.stream, self._Q, plan, self.num_kept, self.batches[0], snapshot)
        whole = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.model.named_parameters()}
        deaden_(self.model, self.stream, self.num_kept)
        return whole

    @torch.no_grad()
    def _losses(self, judges: list[int], round_to: int) -> dict[int, float]:
        legal = [n for n in legal_hidden_sizes(self.model, self.stream, max(round_to, _ROUND_TO)) if n < self.size]
        legal = [n for n in legal if n >= _LEAST * self.size][::-1]
        step = -(-len(legal) // _MOST_TRIED) or 1
        answers, losses = Answers(), {self.size: 0.0}
        with as_in_inference(self.model):
            for index in judges:
                answers.remember(index, self.batches[index], run(self.model, self.batches[index]))
            for num_kept in legal[step - 1 :: step]:
                weights, total, num = self._projected(num_kept), 0.0, 0
                for index in answers.indices:
                    found, rows = answers.divergence(index, self._run(weights, self.batches[index]))
                    total, num = total + found, num + rows
                losses[num_kept] = max(total / max(num, 1), max(losses.values()))  # fewer cannot be better
        return losses

    def _projected(self, num_kept: int) -> dict[str, Tensor]:
        """Return the weights that write to the stream nothing but its strongest directions, unturned."""
        P = self._Q[:, :num_kept] @ self._Q[:, :num_kept].T
        table = self.model.get_submodule(self.stream.embedding).get_parameter("weight")
        weights = {f"{self.stream.embedding}.weight": table @ P.to(table)}
        for name in self.stream.writers:
            layer = self.model.get_submodule(name)
            w_NK = weight_NK(layer)
            projected = P.to(w_NK) @ w_NK
            weights[f"{name}.weight"] = projected if w_NK.shape == layer.weight.shape else projected.T
            if isinstance(bias := layer._parameters.get("bias"), Tensor):
                weights[f"{name}.bias"] = P.to(bias) @ bias
        return weights

    def _run(self, weights: dict[str, Tensor], batch: Batch) -> Any:
        device = next(iter(weights.values())).device
        inputs = {key: value.to(device) for key, value in batch.items()}
        args = (inputs.pop(INPUT),) if INPUT in inputs else ()
        return functional_call(self.model, weights, args, inputs, tie_weights=False)


def _turn_(
    model: nn.Module, stream: Stream, Q: Tensor, plan: Plan, num_kept: int, batch: Batch, snapshot: Snapshot
) -> None:
    """Turn the stream, see that the answers stay, and write into the plan what is to be cut.

    Raises:
        Unsupported: the answers changed.
    """
    was_tied = is_tied(model, stream)
    with as_in_inference(model):
        before = first_tensor(run(model, batch)).float()
        rotate_(model, stream, Q, snapshot)
        check_same_answers(model, before, first_tensor(run(model, batch)).float())
    _write_down(model, stream, plan, num_kept)
    if was_tied:
        own = num_kept * model.get_submodule(stream.head).get_parameter("weight").shape[0]
        plan.notes.append(f"{stream.head} no longer shares its weight with {stream.embedding}: {own:,} parameters more")


def check_same_answers(model: nn.Module, before: Tensor, after: Tensor) -> None:
    """Raise Unsupported where the answers changed when the residual stream was turned."""
    error = float((after - before).norm() / before.norm().clamp_min(1e-20))
    if not error <= _MOST_OF_ROUNDING:
        raise Unsupported(
            f"the answers of {type(model).__name__} changed by {error:.0%} when its residual stream was turned, so it "
            "computes something else than its names suggest: its hidden dimensions cannot be cut"
        )


def _write_down(model: nn.Module, stream: Stream, plan: Plan, num_kept: int) -> None:
    size = _size(model, stream)
    plan.cuts[stream.embedding] = Cut(torch.arange(num_kept), size, "hidden")
    plan.notes.append(f"{num_kept} of {size} hidden dimensions are left")


def _size(model: nn.Module, stream: Stream) -> int:
    return model.get_submodule(stream.embedding).get_parameter("weight").shape[1]


def left_out_layer(stream: Stream, layers: Mapping[str, nn.Module]) -> str:
    """Return a layer of the stream that is no target; empty if all are."""
    return min(stream.linears - layers.keys(), default="")
