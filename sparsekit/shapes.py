"""Which widths a model may be cut to: so that kernels like them, several devices can share them, and others load them.

- `round_to`: every dimension that a cut changes is a multiple of it, on each device. Keeping all units is always legal
  as far as this goes: it changes nothing.
- `tensor_parallel`: heads and channels are dealt out evenly. Of key-value heads there may also be fewer than devices,
  where each is then copied to several, as vLLM and SGLang do; the queries are dealt out all the same.
- `uniform`: all blocks keep the same numbers, since the config of a stock class has one for all. Whether that config
  can say so is asked of the class itself: the head size of a BERT is its hidden size over its number of heads, so it
  cannot lose heads; a LlamaConfig wants a number of heads that divides the hidden size.
"""

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sparsekit.archs import Width, find_blocks, find_widths
from sparsekit.errors import Unsupported
from sparsekit.hf.stock import stock_model
from sparsekit.targets import weight_NK

MIN_UNITS = {"heads": 1, "channels": 8}
"""What a block keeps at least: an attention or MLP that is gone altogether is a matter of depth, not of width."""


@dataclass(frozen=True)
class LegalWidths:
    """What each width may keep.

    Attributes:
        widths: all of the model's.
        numbers: name of a width -> the numbers of units that it may keep, ascending; one where it is left alone.
        groups: widths that must keep the same number; each name is in one group.
        remarks: what is not legal that one might expect, and why.
    """

    widths: tuple[Width, ...]
    numbers: dict[str, tuple[int, ...]]
    groups: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...] = field(default=())

    def rows(self) -> list[dict[str, Any]]:
        """Return a table for people: one row for the widths, of as many units, that have the same choice."""
        alike: dict[tuple[str, int, tuple[int, ...]], list[str]] = {}
        for width in self.widths:
            alike.setdefault((width.kind, width.num_units, self.numbers[width.name]), []).append(width.name)
        return [
            {
                "what": kind,
                "layers": len(names),
                "first layer": names[0],
                "now": num_units,
                "may keep": _listed(numbers),
            }
            for (kind, num_units, numbers), names in alike.items()
        ]


def legal_widths(
    model: nn.Module,
    widths: Sequence[Width] | None = None,
    *,
    round_to: int = 1,
    tensor_parallel: int = 1,
    uniform: bool = False,
    min_units: int | Mapping[str, int] | None = None,
    whole: Collection[str] = (),
) -> LegalWidths:
    """Return the numbers of units that the widths of a model may keep.

    Args:
        model: the model to cut.
        widths: its widths; found where they are not given.
        round_to: the dimensions of the layers that are cut become multiples of this.
        tensor_parallel: over how many devices each layer must be possible to split.
        uniform: keep the same numbers in all blocks, and only those that a stock Hugging Face config can hold.
        min_units: the least to keep in each block, for all kinds or by kind ("heads", "channels"); `MIN_UNITS` if None.
        whole: names of widths that are left as they are.

    Raises:
        ValueError: an argument is out of range, or some width has no legal number at all.
    """
    if round_to < 1 or tensor_parallel < 1:
        raise ValueError(f"{round_to=}, {tensor_parallel=}: both are numbers of at least 1")
    widths = tuple(find_widths(model) if widths is None else widths)
    asked = dict.fromkeys(MIN_UNITS, min_units) if isinstance(min_units, int) else min_units or {}
    least = {**MIN_UNITS, **asked}
    if unknown := (set(whole) - {width.name for width in widths}) | (set(least) - set(MIN_UNITS)):
        raise ValueError(f"{', '.join(sorted(map(repr, unknown)))}: no width of this model, and no kind of units")
    if min(least.values()) < 1:
        raise ValueError(f"{min_units=}: a block keeps 1 unit or more; to drop whole blocks cut depth")
    numbers: dict[str, tuple[int, ...]] = {}
    alike: dict[tuple[Any, ...], tuple[int, ...]] = {}
    for width in widths:
        shape = (width.kind, width.num_units, width.columns, *(rows.per_unit for rows in width.producers))
        if width.name in whole:
            numbers[width.name] = (width.num_units,)
            continue
        if shape not in alike:
            alike[shape] = _numbers(width, round_to, tensor_parallel, min(least[width.kind], width.num_units))
        numbers[width.name] = alike[shape]
    if not uniform:
        return LegalWidths(widths, numbers, tuple((width.name,) for width in widths))
    return _uniform(model, widths, numbers)


def _numbers(width: Width, round_to: int, devices: int, least: int) -> tuple[int, ...]:
    """Return what one width may keep."""
    legal = tuple(
        number
        for number in range(least, width.num_units + 1)
        if _splits(width, number, devices)
        and (number == width.num_units or all(size % round_to == 0 for size in _sizes(width, number, devices)))
    )
    if not legal:
        raise ValueError(
            f"{width.name} has {width.num_units} {width.kind}"
            + (f" of {width.columns} columns each" if width.kind == "heads" else "")
            + f": no number of them from {least} up can be dealt out to tensor_parallel={devices} devices in multiples "
            f"of round_to={round_to}; use fewer devices or a smaller round_to"
        )
    return legal


def _splits(width: Width, number: int, devices: int) -> bool:
    """Whether so many units can be dealt out to devices."""
    if width.kind != "heads" or number >= devices:
        return number % devices == 0
    return devices % number == 0 and (number * _queries(width)) % devices == 0


def _sizes(width: Width, number: int, devices: int) -> list[int]:
    """Return the rows of each producer on one device; the reader has as many columns as some producer has rows."""
    return [
        rows.per_unit if number < devices and rows.per_unit < width.columns else number * rows.per_unit // devices
        for rows in width.producers
    ]


def _queries(width: Width) -> int:
    """Return how many query heads share a key-value head."""
    return width.columns // min(rows.per_unit for rows in width.producers)


def _uniform(model: nn.Module, widths: Sequence[Width], numbers: dict[str, tuple[int, ...]]) -> LegalWidths:
    blocks = find_blocks(model, [width.name for width in widths])
    groups: dict[tuple[str, str], list[Width]] = {}
    for width in widths:
        home = next(chain for chain, names in blocks.items() if any(width.name.startswith(f"{n}.") for n in names))
        groups.setdefault((home, width.kind), []).append(width)
    remarks: list[str] = []
    common = dict(numbers)
    for (home, kind), members in groups.items():
        shared = set.intersection(*(set(numbers[width.name]) for width in members))
        if kind == "heads":
            stock = _of_stock_config(model, members[0], shared)
            if dropped := shared - stock - {members[0].num_units}:
                remarks.append(
                    f"uniform=True: {home} may not keep {_listed(sorted(dropped))} {kind}, since a stock "
                    f"{type(model).__name__} cannot be built so; uniform=False can cut them"
                )
            shared &= stock | {width.num_units for width in members}
        if not shared:
            raise ValueError(
                f"uniform=True: the {kind} of {home} have no legal number in common: they are "
                f"{_listed(sorted({width.num_units for width in members}))} now; use uniform=False"
            )
        common |= {width.name: tuple(sorted(shared)) for width in members}
    return LegalWidths(
        tuple(widths),
        common,
        tuple(tuple(width.name for width in members) for members in groups.values()),
        tuple(remarks),
    )


def _of_stock_config(model: nn.Module, width: Width, numbers: set[int]) -> set[int]:
    """Return those numbers of heads with which the model's own class can be built from its config.

    Some numbers are refused by the config itself. Whether the class takes the head size from it, or divides the hidden
    size by the heads, is seen by building one without memory. What has no config of Hugging Face's kind is nobody's
    stock, so that all numbers are fine.
    """
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return numbers
    configs = {number: config for number in sorted(numbers) if (config := _config_with(model, width, number))}
    fewer = next((number for number in configs if number < width.num_units), None)
    if fewer is None:
        return set(configs)
    try:
        reader = stock_model(model, configs[fewer]).get_submodule(width.name)
    except Unsupported:
        return set()
    return set(configs) if weight_NK(reader).shape[1] == fewer * width.columns else set()


def _config_with(model: nn.Module, width: Width, number: int) -> Any:
    """Return the model's config with another number of heads, None where its class refuses that."""
    from huggingface_hub.errors import StrictDataclassError

    config: Any = copy.deepcopy(model.config)
    text = config.get_text_config()
    queries = _queries(width)
    text.num_attention_heads = number * queries
    text.head_dim = width.columns // queries
    if hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = number
    try:
        type(text).from_dict(text.to_dict())
    except (ValueError, StrictDataclassError):
        return None
    return config


def _listed(numbers: Sequence[int]) -> str:
    """Return numbers as people write them: "64, 128, …, 1024"."""
    if len(numbers) <= 8:
        return ", ".join(map(str, numbers))
    return f"{', '.join(map(str, numbers[:3]))}, …, {numbers[-1]} ({len(numbers)} in all)"
