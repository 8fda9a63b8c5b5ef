"""Which input features can be put into another order, or scaled, for nothing: by rewriting what produces them.

A linear layer does not mind the order of its inputs, as long as its columns follow: W x = W[:, order] x[order]. And
x[order] costs nothing where x comes straight from rows that can be reordered too: of v, for the output projection of an
attention; of gate and up (or fc1), for the layer that closes an MLP. The same for x / s and W * s, where what lies
between the two is linear in x: attention is so in its values, and a * b in b; GELU is not. The weight of a norm can
take up scales for all that read the norm, but no order, since the residual stream is everyone's.

Parts are found by the names that the families of transformers share, and only where nothing else with weights lies
between them. Names do not tell whether a norm is also read by a residual connection (as in BERT), so norms are
taken only from blocks whose forward is known (`_PRE_NORM_BLOCKS`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsekit.archs.blocks import find_blocks
from sparsekit.nn import SideLinear, side_layers
from sparsekit.targets import is_linear, weight_NK


@dataclass(frozen=True)
class Producer:
    """Where channels come from.

    Attributes:
        name: qualified name of a linear layer, whose rows (with the bias) are the channels, or of a norm.
        first: row of the first channel; not 0 where one layer computes several things (q, k and v).
        takes_scales: whether a scale goes here. Not into a gate: the product is linear in the other factor only.
    """

    name: str
    first: int = 0
    takes_scales: bool = True


@dataclass(frozen=True)
class Coupling:
    """Linear layers that read one tensor, and what that tensor is made of.

    Attributes:
        kind: "norm", "mlp" or "value".
        consumers: qualified names of the linear layers that read the tensor; nothing else does.
        producers: what its channels come from.
        num_channels: C, rows of each producer.
        head_size: channels that may change places with one another: a head of the attention, or all.
        repeats: how many heads of the consumers' input in a row are one head of the producers (grouped queries).
        can_permute: whether an order of the channels can be folded in.
        can_scale: whether positive scales of the channels can be.
    """

    kind: str
    consumers: tuple[str, ...]
    producers: tuple[Producer, ...]
    num_channels: int
    head_size: int
    repeats: int = 1
    can_permute: bool = True
    can_scale: bool = True

    @property
    def source(self) -> Tensor:
        """The channel that each input feature of the consumers is, int64 [K] with K = C * repeats."""
        channels = torch.arange(self.num_channels).view(-1, self.head_size)
        return channels.repeat_interleave(self.repeats, dim=0).flatten()

    def input_order(self, order: Tensor) -> Tensor:
        """Return the order [K] of the consumers' inputs that an order [C] of the channels, within heads, gives them."""
        heads = order.view(-1, self.head_size)
        offsets = torch.arange(len(heads) * self.repeats, device=order.device) * self.head_size
        within = (heads % self.head_size).repeat_interleave(self.repeats, dim=0)
        return (within + offsets[:, None]).flatten()

    def channel_order(self, input_order: Tensor) -> Tensor:
        """Return the order [C] of the channels that `input_order` [K] came from.

        Raises:
            ValueError: no order of the channels within their heads gives this one.
        """
        message = (
            f"the inputs of {self.consumers[0]} cannot take this order: it must hold each of {self.num_channels} "
            f"channels once, within heads of {self.head_size}"
            + (f", alike in {self.repeats}" if self.repeats > 1 else "")
        )
        K = self.num_channels * self.repeats
        if input_order.shape != (K,) or not torch.equal(input_order.sort().values.cpu(), torch.arange(K)):
            raise ValueError(message)
        heads = input_order.view(-1, self.repeats, self.head_size)[:, 0] % self.head_size
        offsets = torch.arange(len(heads), device=heads.device) * self.head_size
        order = (heads + offsets[:, None]).flatten()
        if not torch.equal(self.input_order(order), input_order):
            raise ValueError(message)
        return order


def find_couplings(model: nn.Module) -> list[Coupling]:
    """Return the couplings of a model's blocks, in the order of definition.

    Layers that are packed, wrapped (as by peft) or of an unknown kind have none. The inputs of a layer whose side
    branch sums them in groups take neither an order nor scales.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    blocks = [block for names in find_blocks(model, linears).values() for block in names]
    grouped = {name for name, layer in side_layers(model).items() if layer.side_X is None}
    return [
        replace(coupling, can_permute=False, can_scale=False) if grouped.intersection(coupling.consumers) else coupling
        for block in blocks
        for coupling in _of_block(model, block)
    ]


@torch.no_grad()
def fold_order_(model: nn.Module, coupling: Coupling, order: Tensor) -> None:
    """Put the channels into another order, in producers and consumers; the model computes what it did.

    Args:
        model: the model that the coupling was found in.
        coupling: one that `can_permute`.
        order: int64 [C], the channel that comes to each place; within heads.
    """
    if not coupling.can_permute:
        raise ValueError(f"the inputs of {coupling.consumers[0]} cannot be put into another order")
    columns = coupling.input_order(order)
    coupling.channel_order(columns)  # refuses what is no order within heads
    for producer in coupling.producers:
        for rows in _rows(model, producer, coupling.num_channels):
            rows.copy_(rows[order.to(rows.device)])
    for name in coupling.consumers:
        for reads in _reading(model.get_submodule(name)):
            reads.copy_(reads[:, columns.to(reads.device)])


@torch.no_grad()
def fold_scales_(model: nn.Module, coupling: Coupling, scales: Tensor) -> None:
    """Multiply the consumers' columns by scales and divide the producers' channels by them.

    Args:
        model: the model that the coupling was found in.
        coupling: one that `can_scale`.
        scales: [C], positive.
    """
    if not coupling.can_scale:
        raise ValueError(f"the inputs of {coupling.consumers[0]} cannot be scaled")
    if scales.shape != (coupling.num_channels,) or not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError(
            f"scales of the inputs of {coupling.consumers[0]} must be {coupling.num_channels} positive numbers, got "
            f"shape {tuple(scales.shape)} from {scales.min():.3g} to {scales.max():.3g}"
        )
    scales = scales.float()
    for producer in coupling.producers:
        if producer.takes_scales:
            module = model.get_submodule(producer.name)
            offset = 0.0 if is_linear(module) else _offset(module)
            assert offset is not None
            for index, rows in enumerate(_rows(model, producer, coupling.num_channels)):
                divisor = scales.to(rows.device).view(-1, *[1] * (rows.dim() - 1))
                added = offset if index == 0 else 0.0  # a bias is what it says
                rows.copy_((rows.float() + added) / divisor - added)
    for name in coupling.consumers:
        for reads in _reading(model.get_submodule(name)):
            reads.copy_(reads.float() * scales[coupling.source.to(scales.device)].to(reads.device))


def _reading(consumer: nn.Module) -> Iterator[Tensor]:
    """Yield the matrices [..., K] that multiply the consumer's input: its weight, and X of a side branch."""
    yield weight_NK(consumer)
    if isinstance(consumer, SideLinear) and consumer.side_X is not None:
        yield consumer.side_X.detach()


def _rows(model: nn.Module, producer: Producer, num: int) -> Iterator[Tensor]:
    """Yield views of the producer's weight and, if it has them, bias and S; their first dimension is the channels."""
    module = model.get_submodule(producer.name)
    weight = weight_NK(module) if is_linear(module) else module.get_parameter("weight").detach()
    yield weight[producer.first : producer.first + num]
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        yield bias.detach()[producer.first : producer.first + num]
    if isinstance(module, SideLinear):
        yield module.side_S.detach()[producer.first : producer.first + num]


@dataclass(frozen=True)
class Mlp:
    """Names, within one module, of the layers of an MLP.

    Attributes:
        inner: what goes through the activation; None where `other` and it are one layer, gate first.
        other: the other factor of a gated MLP.
        outer: the layer that closes it.
        beside: other parts with weights that the module may hold, before or after the MLP.
        activation: where the activation is.
    """

    inner: str
    outer: str
    other: str | None = None
    beside: tuple[str, ...] = ()
    activation: tuple[str, ...] = ("act_fn", "act", "activation", "activation_fn")
    fused: bool = False


MLPS = [
    Mlp("gate_proj", "down_proj", "up_proj"),
    Mlp("gate_up_proj", "down_proj", fused=True),
    Mlp("up_proj", "down_proj"),
    Mlp("w1", "w2", "w3"),
    Mlp("wi_0", "wo", "wi_1"),
    Mlp("wi", "wo"),
    Mlp("c_fc", "c_proj"),
    Mlp("lin1", "lin2"),
    Mlp("dense_h_to_4h", "dense_4h_to_h"),
    Mlp("fc1", "fc2"),
    Mlp("fc1", "fc2", beside=("self_attn", "encoder_attn", "self_attn_layer_norm", "final_layer_norm")),
    Mlp(
        "intermediate.dense",
        "output.dense",
        beside=("attention", "crossattention", "output.LayerNorm"),
        activation=("intermediate.intermediate_act_fn",),
    ),
]

ATTENTIONS = [
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("q", "k", "v", "o"),
    ("self.query", "self.key", "self.value", "output.dense"),
    ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
]
"""Names, within one module, of the layers of an attention: queries, keys, values, output. One layer may be three."""

_BESIDE_VALUES = (
    "q_norm",
    "k_norm",
    "q_layernorm",
    "k_layernorm",
    "relative_attention_bias",
    "output.LayerNorm",
    "sinks",
)
"""Parts of an attention that do not touch its values, or come after its output."""

HEAD_SIZES = ("head_dim", "attention_head_size", "key_value_proj_dim", "self.attention_head_size")

_LLAMA = (("input_layernorm", "self_attn"), ("post_attention_layernorm", "mlp"))
_PRE_NORM_BLOCKS: dict[str, tuple[tuple[str, str], ...]] = {
    "LlamaDecoderLayer": _LLAMA,
    "MistralDecoderLayer": _LLAMA,
    "Qwen2DecoderLayer": _LLAMA,
    "Qwen3DecoderLayer": _LLAMA,
    "Phi3DecoderLayer": _LLAMA,
    "GraniteDecoderLayer": _LLAMA,
    "Starcoder2DecoderLayer": _LLAMA,
    "SmolLM3DecoderLayer": _LLAMA,
    "GemmaDecoderLayer": _LLAMA,
    "Gemma2DecoderLayer": (("input_layernorm", "self_attn"), ("pre_feedforward_layernorm", "mlp")),
    "Gemma3DecoderLayer": (("input_layernorm", "self_attn"), ("pre_feedforward_layernorm", "mlp")),
    "OPTDecoderLayer": (("self_attn_layer_norm", "self_attn"), ("final_layer_norm", "")),
    "GPT2Block": (("ln_1", "attn"), ("ln_2", "mlp")),
}
"""Class of a block -> (norm, the part that alone reads it), for blocks that keep their residual clear of the norms."""


def _of_block(model: nn.Module, block: str) -> Iterator[Coupling]:
    root = model.get_submodule(block)
    first_layers: dict[str, tuple[str, ...]] = {}  # part -> the layers that read its input
    found = []
    for inside, module in root.named_modules():
        name = f"{block}.{inside}" if inside else block
        for find in (value_coupling, mlp_coupling):
            if (hit := find(module, name)) is not None:
                coupling, readers = hit
                found.append(coupling)
                first_layers.setdefault(inside, tuple(dict.fromkeys(readers)))
    if getattr(root, "do_layer_norm_before", True):
        for norm, part in _PRE_NORM_BLOCKS.get(type(root).__name__, ()):
            norm_module = _at(root, norm)
            if norm_module is not None and part in first_layers and _offset(norm_module) is not None:
                width = norm_module.get_parameter("weight").shape[0]
                yield Coupling(
                    "norm", first_layers[part], (Producer(f"{block}.{norm}"),), width, width, can_permute=False
                )
    yield from found


def value_coupling(module: nn.Module, name: str) -> tuple[Coupling, Sequence[str]] | None:
    """Return what the output of an attention reads, with the names of queries, keys and values; None for others."""
    head_size = next((size for path in HEAD_SIZES if isinstance(size := _attribute(module, path), int)), None)
    for names in ATTENTIONS:
        q, k, v, o = (_linear(module, path) for path in names)
        if q is None or k is None or v is None or o is None or head_size is None:
            continue
        if _has_others(module, (*names, *_BESIDE_VALUES)):
            continue
        width = weight_NK(o).shape[1]
        if v is q:
            queries, first = width, (weight_NK(v).shape[0] + width) // 2
            channels = weight_NK(v).shape[0] - first
        else:
            queries, first, channels = weight_NK(q).shape[0], 0, weight_NK(v).shape[0]
        if queries != width or channels % head_size or channels == 0 or width % channels:
            continue
        clips = getattr(getattr(module, "config", None), "clip_qkv", None) is not None
        coupling = Coupling(
            "value",
            (f"{name}.{names[3]}",),
            (Producer(f"{name}.{names[2]}", first),),
            channels,
            head_size,
            repeats=width // channels,
            can_scale=not clips,
        )
        return coupling, [f"{name}.{path}" for path in names[:3]]
    return None


def mlp_coupling(module: nn.Module, name: str) -> tuple[Coupling, Sequence[str]] | None:
    """Return what closes an MLP reads, with the names of the layers that open it; None for others."""
    for form in MLPS:
        inner, outer = _linear(module, form.inner), _linear(module, form.outer)
        other = _linear(module, form.other) if form.other else None
        if inner is None or outer is None or (form.other and other is None):
            continue
        paths = [form.inner, form.outer] + ([form.other] if form.other else [])
        if _has_others(module, (*paths, *form.beside)):
            continue
        width, parts = weight_NK(outer).shape[1], 2 if form.fused else 1
        if any(weight_NK(each).shape[0] != width * parts for each in (inner, other) if each is not None):
            continue
        gated = form.fused or other is not None
        producers = [Producer(f"{name}.{form.inner}", takes_scales=not gated)]
        if form.fused:
            producers.append(Producer(f"{name}.{form.inner}", width))
        elif form.other:
            producers.append(Producer(f"{name}.{form.other}"))
        activation = next((found for path in form.activation if (found := _attribute(module, path)) is not None), None)
        coupling = Coupling(
            "mlp",
            (f"{name}.{form.outer}",),
            tuple(producers),
            width,
            width,
            can_scale=gated or (activation is not None and _keeps_scales(activation)),
        )
        return coupling, [producer.name for producer in producers]
    return None


def _has_others(module: nn.Module, known: Sequence[str]) -> bool:
    """Whether a module holds parameters, or norms, beside the parts that are known."""
    inside = [name for name, _ in module.named_parameters()]
    inside += [name for name, _ in module.named_modules() if "norm" in name.lower().rpartition(".")[2]]
    return any(not any(name == part or name.startswith(f"{part}.") for part in known) for name in inside)


def _offset(norm: nn.Module) -> float | None:
    """Return b where the norm computes n(x) * (weight + b) + bias (Gemma has b = 1); None where it does neither."""
    weight = dict(norm.named_parameters(recurse=False)).get("weight")
    if weight is None or weight.dim() != 1 or weight.is_meta:
        return None
    x = torch.linspace(-1, 2, weight.shape[0], dtype=weight.dtype, device=weight.device)[None].square()
    parameters = {name: torch.zeros_like(value) for name, value in norm.named_parameters(recurse=False)}
    for offset in (0.0, 1.0):
        if not bool(functional_call(norm, parameters | {"weight": torch.full_like(weight, -offset)}, (x,)).any()):
            return offset
    return None


def _keeps_scales(activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether f(s x) = s f(x) for s > 0, as ReLU has it: seen at some x."""
    x = torch.linspace(-3, 3, 13)
    return bool(torch.equal(activation(4 * x), 4 * activation(x)))


def _at(module: nn.Module, path: str) -> nn.Module | None:
    found = _attribute(module, path)
    return found if isinstance(found, nn.Module) else None


def _linear(module: nn.Module, path: str) -> nn.Module | None:
    found = _at(module, path)
    usable = found is not None and is_linear(found) and not hasattr(found, "parametrizations")
    return found if usable else None


def _attribute(root: nn.Module, path: str) -> Any:
    found: Any = root
    for part in path.split("."):
        found = getattr(found, part, None)
    return found
