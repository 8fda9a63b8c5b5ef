"""How large the blocks of a model are, before and after some of it went."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparsekit.archs import find_blocks, find_widths
from sparsekit.budgets import count_flops
from sparsekit.errors import Unsupported
from sparsekit.plan import Cut
from sparsekit.report import Report, show
from sparsekit.targets import is_linear

_COUNTS = ("heads", "KV heads", "channels", "parameters", "FLOPs")


@dataclass(frozen=True)
class Sizes:
    """What a model has.

    Attributes:
        blocks: name of a block -> its heads (of queries), KV heads where they are fewer, channels, parameters, and the
            FLOPs of one sequence, as budgets count them; what is not known is not there.
        parameters: of the whole model.
        hidden: dimensions of the residual stream, where the model embeds tokens.
    """

    blocks: dict[str, dict[str, int]]
    parameters: int
    hidden: int | None

    @classmethod
    def of(cls, model: nn.Module, length: float) -> "Sizes":
        """Return the sizes of a model that is not packed, for sequences of `length` tokens."""
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        blocks = {
            block: {"parameters": num_parameters(model.get_submodule(block))}
            for names in find_blocks(model, linears).values()
            for block in names
        }
        try:
            widths = find_widths(model)
        except Unsupported:  # blocks can be taken out of models whose heads and channels are not known
            widths = []
        flops = count_flops(model, widths, length).curves if widths else {}
        for width in widths:
            own = next(found for block, found in blocks.items() if width.name.startswith(f"{block}."))
            own["FLOPs"] = own.get("FLOPs", 0) + int(flops[width.name][-1])
            if width.kind == "channels":
                own["channels"] = own.get("channels", 0) + width.num_units
                continue
            repeats = width.columns // width.producers[-1].per_unit
            own["heads"] = own.get("heads", 0) + width.num_units * repeats
            if repeats > 1:
                own["KV heads"] = own.get("KV heads", 0) + width.num_units
        get = getattr(model, "get_input_embeddings", None)
        hidden = getattr(get() if get else None, "embedding_dim", None)
        return cls(blocks, num_parameters(model), hidden)

    def total(self, count: str) -> int:
        """Return the sum of one count over the blocks."""
        return sum(found.get(count, 0) for found in self.blocks.values())


def num_parameters(module: nn.Module) -> int:
    """Return the number of parameters, shared ones counted once."""
    return sum(parameter.numel() for parameter in module.parameters())


def sizes_report(before: Sizes, after: Sizes, cuts: Mapping[str, Cut], length: float) -> Report:
    """Return the table of blocks before and after, and what is left in all."""
    names = _names_after(before, cuts)
    columns = [count for count in _COUNTS if any(count in found for found in before.blocks.values())]
    report = Report("Layers, before and after")
    for block, old in before.blocks.items():
        name = names[block]
        new = {} if name is None else after.blocks[name]
        row: dict[str, Any] = {"block": block}
        for count in columns:
            row |= {count: old.get(count, 0), f"{count} left": new.get(count, 0)}
        report.rows.append(row)
    counts = {"parameters": (before.parameters, after.parameters)}
    counts |= {f"{count} of the blocks": (before.total(count), after.total(count)) for count in columns}
    if before.hidden is not None and after.hidden is not None and before.hidden != after.hidden:
        counts["hidden dimensions"] = before.hidden, after.hidden
    for name, (was, left) in counts.items():
        report.summary[name] = f"{_human(was)} -> {_human(left)} ({left / max(was, 1):.1%})"
        report.numbers[name] = {"before": was, "after": left}
    if "FLOPs" in columns:
        report.notes.append(f"FLOPs: of the linear layers and attentions of the blocks, for {length:.4g} tokens")
    return report


def shown(report: Report) -> Report:
    """Return the table as people read it, "12 -> 7" in one column."""
    rows = []
    for row in report.rows:
        counts = [key for key in row if key != "block" and not key.endswith(" left")]
        rows.append({"block": row["block"]} | {count: _arrow(row[count], row[f"{count} left"]) for count in counts})
    return Report(report.title, rows, report.summary, report.notes, report.ok)


def _arrow(was: int, left: int) -> str:
    return _human(was) if was == left else f"{_human(was)} -> {_human(left)}"


def _human(number: int) -> str:
    """Return "209.8 M" for 209780736; small numbers whole."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{show(number / size)} {unit}"
    return show(number)


def _names_after(before: Sizes, cuts: Mapping[str, Cut]) -> dict[str, str | None]:
    """Return block -> its name in the cut model, None where it is gone."""
    names: dict[str, str | None] = {block: block for block in before.blocks}
    for blocks, cut in cuts.items():
        if cut.kind == "layers":
            names |= {f"{blocks}.{place}": None for place in range(cut.num)}
            names |= {f"{blocks}.{old}": f"{blocks}.{new}" for new, old in enumerate(cut.kept.tolist())}
    return names
