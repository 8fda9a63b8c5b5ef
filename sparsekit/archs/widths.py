"""What can be cut out of a block without a change to anything around it: heads of attentions, channels of MLPs.

A unit goes with the rows that make it and the columns that read it. Under grouped queries it is a key-value head with
all the queries that share it: a query head less in one group would leave the others attending to the wrong keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekit.archs.blocks import find_blocks
from sparsekit.archs.producers import ATTENTIONS, MLPS, Mlp, mlp_coupling, value_coupling
from sparsekit.errors import Unsupported
from sparsekit.targets import is_linear


@dataclass(frozen=True)
class Rows:
    """Rows of a linear layer, and entries of its bias, that make units: `first + i * per_unit` and on make unit i."""

    name: str
    first: int
    per_unit: int

    def of(self, units: Tensor) -> Tensor:
        """Return the rows of `units` (int64 [n]), int64 [n * per_unit] in the order of the units."""
        return self.first + _spread(units, self.per_unit)


@dataclass(frozen=True)
class Width:
    """Units of one kind, in one block, each of which can go.

    Attributes:
        name: qualified name of the linear layer that reads them; no other layer does.
        kind: "heads" (under grouped queries a key-value head with all its queries) or "channels".
        num_units: how many there are now.
        columns: columns of the reader for each unit.
        producers: the rows that make them; three of one layer where it computes queries, keys and values at once.
    """

    name: str
    kind: str
    num_units: int
    columns: int
    producers: tuple[Rows, ...]

    def columns_of(self, units: Tensor) -> Tensor:
        """Return the reader's columns of `units` (int64 [n]), int64 [n * columns] in the order of the units."""
        return _spread(units, self.columns)


def find_widths(model: nn.Module) -> list[Width]:
    """Return the widths of a model's blocks, in the order in which they run.

    Raises:
        Unsupported: the model has none that are known. The message says what is missing, and how to describe it.
    """
    order = {name: index for index, (name, module) in enumerate(model.named_modules()) if is_linear(module)}
    blocks = [block for names in find_blocks(model, order).values() for block in names]
    found = [width for block in blocks for width in _of_block(model, block)]
    if not found:
        raise Unsupported(_unknown(model, blocks, order))
    return sorted(found, key=lambda width: order[width.name])


def describe_attention(queries: str, keys: str, values: str, output: str) -> None:
    """Make attentions known whose four linear layers have these names, within the module that holds them.

    That module must say how wide a head is (`head_dim` or `attention_head_size`), and take the number of heads from
    the widths of its layers (`view(…, -1, head_dim)`), or from an attribute `num_heads`.
    """
    if (names := (queries, keys, values, output)) not in ATTENTIONS:
        ATTENTIONS.append(names)


def describe_mlp(inner: str, outer: str, other: str | None = None) -> None:
    """Make MLPs known whose layers have these names, within the module that holds them.

    Args:
        inner: the layer whose outputs go through the activation.
        outer: the layer that reads the result.
        other: the layer that makes the other factor of a gated MLP.
    """
    if (form := Mlp(inner, outer, other)) not in MLPS:
        MLPS.append(form)


def _of_block(model: nn.Module, block: str) -> Iterator[Width]:
    for inside, module in model.get_submodule(block).named_modules():
        name = f"{block}.{inside}" if inside else block
        if (hit := value_coupling(module, name)) is not None and _is_cut_by_heads(module, hit[0].head_size):
            values, (queries, keys, _) = hit
            head, repeats = values.head_size, values.repeats
            num_units, width = values.num_channels // head, head * repeats
            first_key = width * num_units if keys == queries else 0
            yield Width(
                values.consumers[0],
                "heads",
                num_units,
                width,
                (
                    Rows(queries, 0, width),
                    Rows(keys, first_key, head),
                    Rows(values.producers[0].name, values.producers[0].first, head),
                ),
            )
        if (hit := mlp_coupling(module, name)) is not None:
            channels, _ = hit
            rows = tuple(Rows(producer.name, producer.first, 1) for producer in channels.producers)
            yield Width(channels.consumers[0], "channels", channels.num_channels, 1, rows)


def _is_cut_by_heads(attention: nn.Module, head_size: int) -> bool:
    """Whether nothing else in an attention is made for its number of heads.

    A norm of queries or keys must be that of one head (OLMo 2 has one across all); a fused layer must be split by an
    attribute of the module (Phi 3 reads the config, which is one for all layers); and there may be no bias or sink for
    each head (T5, GPT-OSS).
    """
    fused = any(hasattr(attention, name) for name in ("c_attn", "qkv_proj")) and not hasattr(attention, "split_size")
    per_head = any(hasattr(attention, name) for name in ("has_relative_attention_bias", "sinks"))
    norms = [part for name, part in attention.named_children() if name.endswith(("norm", "layernorm"))]
    sizes = {weight.numel() for norm in norms for weight in norm.parameters()}
    return not fused and not per_head and sizes <= {head_size}


def _spread(units: Tensor, per_unit: int) -> Tensor:
    return (units[:, None] * per_unit + torch.arange(per_unit, device=units.device)).flatten()


def _unknown(model: nn.Module, blocks: Sequence[str], linears: dict[str, int]) -> str:
    """Say what of a model is not known, and how to make it so."""
    how = (
        "If they are an attention or an MLP that computes as others do under other names, say so before: "
        "sparsekit.archs.describe_attention('q_proj', 'k_proj', 'v_proj', 'o_proj') or describe_mlp('fc1', 'fc2')"
    )
    if not linears:
        return f"{type(model).__name__} holds no linear layer: there are no heads or channels to cut"
    if not blocks:
        return f"{type(model).__name__} has no list of blocks (an nn.ModuleList) to look for heads and channels in"
    inside = [name.removeprefix(f"{blocks[0]}.") for name in linears if name.startswith(f"{blocks[0]}.")]
    return (
        f"no heads or channels are known in {type(model).__name__}: the linear layers of its block {blocks[0]} are "
        f"{', '.join(inside) or 'none'}. {how}"
    )
