"""SliceGPT (arXiv 2401.15024): turn the residual stream so that its energy lies in few dimensions, and cut the others.

An RMSNorm without its weight commutes with a rotation Q: norm(x Q) = norm(x) Q. So the weight of each norm moves into
the layers that read it, what reads becomes W Q, what writes Qᵀ W, embeddings E Q, and the model computes what it did.
Q are the eigenvectors, by falling eigenvalue, of Σ x xᵀ over the inputs of all norms, each token scaled as its norm
scales it (float64). The last dimensions then carry little, and go.

The paper takes another Q for each block, which needs a matrix of its own on every residual connection, and so a model
that no stock class is. Here one Q serves all blocks: what comes out is a plain config with a smaller hidden size. An
embedding that is tied to the head is untied, for only the head takes up the weight of the last norm.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.archs import find_blocks, find_couplings, find_widths
from sparsekit.budgets import Budget, Costs, count_flops, count_params
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.base import StructuredMethod, check_counts
from sparsekit.methods.structured.inputs import mean_length, run
from sparsekit.methods.structured.watch import Tokens
from sparsekit.residual import owner_of_stream
from sparsekit.snapshot import Snapshot
from sparsekit.targets import is_linear, set_weight_NK_, weight_NK


@dataclass(frozen=True, kw_only=True)
class SliceGPT(StructuredMethod):
    """Rotation and cut of the hidden dimensions.

    Attributes:
        round_to: the hidden size that is left is a multiple of this, and of the number of heads.
    """

    round_to: int = 8

    name = "slicegpt"
    updates_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "round_to")


@dataclass(frozen=True)
class Stream:
    """Who writes to the residual stream of a model, and who reads it; names of modules.

    Attributes:
        embedding: of the tokens.
        head: the output layer.
        writers: linear layers whose outputs are added.
        readers: norm -> linear layers that read it; nothing else does.
    """

    embedding: str
    head: str
    writers: tuple[str, ...]
    readers: dict[str, tuple[str, ...]]

    @property
    def linears(self) -> set[str]:
        """The linear layers of the blocks."""
        return {*self.writers, *(name for readers in self.readers.values() for name in readers)} - {self.head}

    @classmethod
    def of(cls, model: nn.Module) -> "Stream":
        """Return the stream of a model.

        Raises:
            Unsupported: it is of no family whose norms take a rotation.
        """
        names = {id(module): name for name, module in model.named_modules()}
        get_input, get_head = (getattr(model, f"get_{which}_embeddings", None) for which in ("input", "output"))
        embedding, head = get_input() if get_input else None, get_head() if get_head else None
        if not isinstance(embedding, nn.Embedding) or head is None or not is_linear(head):
            raise Unsupported(
                f"hidden dimensions of {type(model).__name__} cannot go: they are turned first, which takes RMSNorms "
                "and an output layer that turns along, as Llama and its like have. Use method='contribution', which "
                "takes heads and channels out"
            )
        owner_of_stream(model, names[id(embedding)])
        blocks = find_blocks(model, [name for name, module in model.named_modules() if is_linear(module)])
        inside = tuple(f"{block}." for chain in blocks.values() for block in chain)
        last = [
            name
            for name, module in model.named_modules()
            if "RMSNorm" in type(module).__name__ and not name.startswith(inside)
        ]
        readers = {
            coupling.producers[0].name: coupling.consumers
            for coupling in find_couplings(model)
            if coupling.kind == "norm"
        }
        if len(last) != 1 or len(readers) != 2 * len(inside):
            raise Unsupported(
                f"{type(model).__name__} has {len(readers)} norms with known readers in {len(inside)} blocks, and "
                f"{len(last)} behind them, where two in each and one behind were expected: it cannot be turned"
            )
        writers = tuple(width.name for width in find_widths(model))
        return cls(names[id(embedding)], names[id(head)], writers, readers | {last[0]: (names[id(head)],)})


def is_tied(model: nn.Module, stream: Stream) -> bool:
    """Return whether the head shares the embedding's weight."""
    return model.get_submodule(stream.head).weight is model.get_submodule(stream.embedding).weight


def legal_hidden_sizes(model: nn.Module, stream: Stream, round_to: int) -> list[int]:
    """Return the hidden sizes that a model can have, ascending; the one that it has is the last."""
    size = model.get_submodule(stream.embedding).get_parameter("weight").shape[1]
    step = math.lcm(round_to, getattr(getattr(model, "config", None), "num_attention_heads", 1))
    return [*range(step, size, step), size]


def hidden_size_for(model: nn.Module, config: SliceGPT, stream: Stream, batches: list[Batch]) -> tuple[int, str]:
    """Return the largest legal hidden size that the budget pays for, and a sentence on what that leaves.

    Raises:
        ValueError: it pays for none, or is one in time.
    """
    size = model.get_submodule(stream.embedding).get_parameter("weight").shape[1]
    legal = legal_hidden_sizes(model, stream, config.round_to)
    budget, widths = Budget.parse(config.budget), find_widths(model)
    if budget.measure == "ns":
        raise ValueError(f"{budget}: method='slicegpt' knows budgets in sparsity, params and flops")
    shares = np.arange(size + 1) / size
    if budget.measure == "params":
        params = sum(parameter.numel() for parameter in model.parameters())
        own_head = model.get_submodule(stream.head).get_parameter("weight").numel() if is_tied(model, stream) else 0
        whole = count_params(model, widths).dense if budget.is_share else params + own_head
        curve = np.ceil(whole * shares).astype(np.int64)
        curve[-1] = whole if budget.is_share else params  # uncut, a head stays tied
        costs = Costs("params", {"hidden": curve})
    else:
        length = config.length or mean_length(model, widths[0].name, batches) or 128
        dense = count_flops(model, widths, length).dense
        weights = sum(weight_NK(model.get_submodule(name)).numel() for name in stream.linears)
        costs = Costs("flops", {"hidden": np.round(dense - 2 * length * weights * (1 - shares)).astype(np.int64)})
    most = budget.limits(costs)[1]
    fitting = [number for number in legal if costs.curves["hidden"][number] <= most]
    if not fitting:
        nearest = budget.entry(int(costs.curves["hidden"][legal[0]]), costs)
        raise ValueError(f"no hidden size from {legal[0]} up is within {budget}: {nearest} pays for {legal[0]}")
    return fitting[-1], budget.met(int(costs.curves["hidden"][fitting[-1]]), costs)


def principal_directions(model: nn.Module, stream: Stream, batches: list[Batch]) -> Tensor:
    """Return the eigenvectors of the mean of x xᵀ over the inputs of all norms, float64 [d, d], strongest first.

    Raises:
        NonFiniteError: activations hold NaN or infinity.
    """
    total: Tensor | None = None
    tokens = Tokens([])

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal total
        x = tokens.pick(args[0]).float()
        x = x / x.square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-20)
        moment = (x.T @ x).double().cpu()
        total = moment if total is None else total + moment

    with as_in_inference(model):
        hooks = [model.get_submodule(name).register_forward_pre_hook(see) for name in stream.readers]
        try:
            for batch in batches:
                tokens = Tokens.of(batch)
                run(model, batch)
        finally:
            for hook in hooks:
                hook.remove()
    assert total is not None
    if not bool(total.isfinite().all()):
        raise NonFiniteError("hidden states hold NaN or infinity on the calibration data: check the model's weights")
    return torch.linalg.eigh(total).eigenvectors.flip(dims=[1])


@torch.no_grad()
def rotate_(model: nn.Module, stream: Stream, Q: Tensor, snapshot: Snapshot) -> None:
    """Turn the residual stream by Q; the model computes what it did.

    Args:
        model: changed in place; all shapes stay.
        stream: of the model.
        Q: orthogonal, float64 [d, d].
        snapshot: takes it back if the caller fails.
    """
    untie_(model, stream, snapshot)
    for name in (stream.embedding, stream.head, *stream.readers, *stream.linears):
        snapshot.remember(name)
    table = model.get_submodule(stream.embedding).get_parameter("weight")
    table.copy_(table.double() @ Q.to(table.device))
    for norm, readers in stream.readers.items():
        scale = model.get_submodule(norm).get_parameter("weight")
        for name in readers:
            w_NK = weight_NK(model.get_submodule(name)).double()
            set_weight_NK_(model.get_submodule(name), (w_NK * scale.double()) @ Q.to(w_NK.device))
        scale.fill_(1)
    for name in stream.writers:
        layer = model.get_submodule(name)
        w_NK = weight_NK(layer).double()
        set_weight_NK_(layer, Q.T.to(w_NK.device) @ w_NK)
        if isinstance(bias := layer._parameters.get("bias"), Tensor):
            bias.copy_(Q.T.to(bias.device) @ bias.double())


@torch.no_grad()
def deaden_(model: nn.Module, stream: Stream, num_kept: int) -> None:
    """Let nothing write to the hidden dimensions after the first `num_kept`, nor read them; after `rotate_`."""
    model.get_submodule(stream.embedding).get_parameter("weight")[:, num_kept:] = 0
    for name in stream.writers:
        layer = model.get_submodule(name)
        weight_NK(layer)[num_kept:] = 0
        if isinstance(bias := layer._parameters.get("bias"), Tensor):
            bias[num_kept:] = 0
    for readers in stream.readers.values():
        for name in readers:
            weight_NK(model.get_submodule(name))[:, num_kept:] = 0


def untie_(model: nn.Module, stream: Stream, snapshot: Snapshot) -> None:
    """Give the head a weight of its own, where it shares the embedding's."""
    head = model.get_submodule(stream.head)
    weight = head.get_parameter("weight")
    if weight is not model.get_submodule(stream.embedding).get_parameter("weight"):
        return
    own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
    snapshot.set_parameters_(stream.head, own, head._parameters.get("bias"))
    for owner, attribute, value in _ties(model):
        snapshot.keep_(owner, attribute)
        setattr(owner, attribute, value)


def _ties(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return where a transformers model and its config say that the head is tied, and what they are to say."""
    config: Any = getattr(model, "config", None)
    found: list[tuple[Any, str, Any]] = [(config, "tie_word_embeddings", False)]
    if isinstance(vars(model).get("all_tied_weights_keys"), dict):
        found.append((model, "all_tied_weights_keys", {}))
    return found


METHODS.register("slicegpt", SliceGPT)
