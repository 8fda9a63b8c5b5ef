"""What holds, layer by layer: the contract at the end of every run, and who runs what and why."""

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.archs import find_widths
from sparsekit.backends import BACKENDS
from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS
from sparsekit.hf.describe import is_pretrained, who_opens, widths_of
from sparsekit.masks import Mask
from sparsekit.nn import SideLinear, SparseLinear, linear_size, side_layers, sparse_layers, unwrapped
from sparsekit.pack import why_dense
from sparsekit.patterns import NM, Block, Pattern
from sparsekit.plan import Plan
from sparsekit.report import Report
from sparsekit.targets import is_linear, weight_NK

FEW_ZEROS = 0.25
"""A layer with a smaller share of exact zeros has them by chance, as after a conversion to fp16: it is dense."""


def check(model: nn.Module, plan: Plan | None = None) -> Report:
    """Return a table of every linear layer: pattern, format, sparsity asked and got, finiteness, bytes, bits for each
    weight of the dense matrix, backend and why.

    The numbers of a side branch are no zeros: they are taken off the sparsity, and counted in bytes and bits; the
    column "side" says how many there are.

    Args:
        model: packed, masked or dense.
        plan: what was asked for; without one, packed layers must hold the pattern of their format.
    Returns:
        A report, one row a layer, whose `ok` is False if a layer breaks its pattern, has fewer zeros than asked, or
        holds NaN or infinity. Its notes name such layers.
    """
    model = unwrapped(model)
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    packed, weights = sparse_layers(model), dict[str, int]()
    has_branches = bool(side_layers(model)) or any(layer.side is not None for layer in packed.values())
    for name, module in model.named_modules():
        sparse = packed.get(name)
        if sparse is not None:
            weight = sparse.to_dense()
        elif is_linear(module):
            weight = weight_NK(module)
        else:
            continue
        if weight.device.type == "meta":
            continue
        weights[name] = weight.numel()
        mask = plan.masks.get(name) if plan else None
        asked = mask.pattern if mask else _pattern_of(sparse) if sparse is not None else None
        asked_share = mask.sparsity if mask else asked.fixed_sparsity() if asked else None
        got = sparsity_of(weight)
        branch = (
            sparse.side_branch() if sparse is not None else module.branch if isinstance(module, SideLinear) else None
        )
        num_numbers = 0 if branch is None else branch.num_numbers
        parts = [weight] if branch is None else [weight, branch.S, *([] if branch.X is None else [branch.X])]
        finite = all(bool(torch.isfinite(part).all()) for part in parts)
        broken = _count_broken(weight, asked, mask) if asked else 0
        if not finite:
            problems.append(f"{name} holds NaN or infinity")
        if broken:
            problems.append(f"{name} breaks {asked} in {broken:,} places")
        if plan is not None and name in plan.side and branch is None:
            problems.append(f"{name} lacks the side branch of the plan: call sparsekit.apply_(model, plan)")
        if mask is not None and bool((weight[~mask.keep.to(weight.device)] != 0).any()):
            problems.append(f"{name} has non-zeros where the plan removes: call sparsekit.apply_(model, plan)")
        num_bytes = sparse.packed_bytes() if sparse is not None else weight.nbytes + num_numbers * weight.itemsize
        rows.append(
            {
                "layer": name,
                "shape": f"{weight.shape[0]}x{weight.shape[1]}",
                "pattern": str(asked) if asked else "dense" if got < FEW_ZEROS else "zeros, no plan",
                "format": sparse.format if sparse is not None else "dense",
                **({"side": num_numbers} if has_branches else {}),
                "asked": None if asked_share is None else round(asked_share, 4),
                "sparsity": round(got - num_numbers / max(weight.numel(), 1), 4),
                "finite": finite,
                "dense bytes": weight.nbytes,
                "bytes": num_bytes,
                "bits a weight": round(8 * num_bytes / max(weight.numel(), 1), 3),
                "backend": sparse.backend if sparse is not None else "torch",
            }
        )
    pruned = [row for row in rows if row["pattern"] != "dense"]
    summary: dict[str, Any] = {
        "linear layers": len(rows),
        "sparse": len(pruned),
        "packed": len(packed),
    }
    numbers: dict[str, Any] = {}
    if pruned:
        dense_bytes, now_bytes = sum(row["dense bytes"] for row in pruned), sum(row["bytes"] for row in pruned)
        zeros = sum(row["sparsity"] * row["dense bytes"] for row in pruned)
        summary["sparsity of the sparse layers"] = round(zeros / dense_bytes, 4)
        summary["bytes of the sparse layers"] = (
            f"{now_bytes:,} of {dense_bytes:,} dense ({now_bytes / dense_bytes:.3f})"
        )
        num_weights = sum(weights[row["layer"]] for row in pruned)
        bits = 8 * now_bytes / max(num_weights, 1)
        summary["bits a weight of the sparse layers"] = round(bits, 3)
        numbers = {"sparse_bytes": now_bytes, "dense_bytes": dense_bytes, "ratio": now_bytes / dense_bytes}
        numbers["bits_a_weight"] = bits
    if plan is not None and plan.cuts:
        problems += _cuts_that_are_not_made(model, plan)
        for kind, (num, total) in plan.units().items():
            summary[f"{kind} left"] = f"{num:,} of {total:,}" + (
                ", where any go" if kind in ("heads", "channels") else ""
            )
    notes = problems + _why_these_backends(packed) + _second_copies(packed)
    if widths_of(model) or (plan is not None and plan.cuts and is_pretrained(model)):
        notes.append(who_opens(model))
    if plan is not None:
        missing = [name for name in plan.masks if name not in dict(model.named_modules())]
        notes += [f"the plan names {name}, which the model does not have" for name in missing]
        notes += plan.notes
        problems += missing
    if pruned and not packed:
        notes.append("no layer is packed: the zeros save neither time nor memory until sparsekit.pack_(model)")
    elif loose := [row["layer"] for row in pruned if row["layer"] not in packed and row["sparsity"] >= 0.25]:
        notes.append(f"{len(loose)} sparse layers are not packed and no faster for their zeros, as {loose[0]}")
    return Report("sparsekit check", rows, summary, notes, ok=not problems, numbers=numbers)


def _cuts_that_are_not_made(model: nn.Module, plan: Plan) -> list[str]:
    """Return a sentence for each cut whose part has another size than it leaves; packed heads cannot be counted."""
    modules = dict(model.named_modules())
    try:
        heads = {width.name: width.num_units for width in find_widths(model) if width.kind == "heads"}
    except Unsupported:  # as where all is packed
        heads = {}
    found = []
    for name, cut in plan.cuts.items():
        if (module := modules.get(name)) is None:
            found.append(f"the plan cuts {name}, which the model does not have")
            continue
        size = linear_size(module)
        now = {
            "layers": len(list(module.children())),
            "hidden": getattr(module, "embedding_dim", 0),
            "channels": size[1] if size else 0,
            "heads": heads.get(name, len(cut.kept)),
        }[cut.kind]
        if now != len(cut.kept):
            left = len(cut.kept)
            found.append(f"{name} has {now} {cut.kind}, the plan leaves {left}: call sparsekit.apply_(model, plan)")
    return found


def _pattern_of(layer: SparseLinear) -> Pattern:
    """Return the pattern that the layer's format holds."""
    return NM(2, 4) if layer.spec.block is None else Block(*layer.spec.block)


def _count_broken(weight: Tensor, asked: Pattern, mask: Mask | None) -> int:
    """Return in how many places `weight` breaks the pattern; a zero inside a kept block is not one."""
    nonzero = weight != 0
    if isinstance(asked, Block):
        return asked.count_violations(nonzero | mask.keep.to(weight.device)) if mask else 0
    return asked.count_violations(nonzero)


def _why_these_backends(packed: dict[str, SparseLinear]) -> list[str]:
    """Return one sentence for each backend in use: how many layers, and why not the ones asked before it."""
    counts: Counter[tuple[str, str]] = Counter()
    for layer in packed.values():
        counts[layer.backend, "; ".join(f"not {name}: {reason}" for name, reason in layer.reasons.items())] += 1
    return [f"{count} layers run on {name!r}" + (f" ({why})" if why else "") for (name, why), count in counts.items()]


def _second_copies(packed: dict[str, SparseLinear]) -> list[str]:
    """Return a sentence on what second copies for prefill cost, if there are any."""
    costs = [cost for cost in (layer.second_copy_bytes() for layer in packed.values()) if cost]
    return [f"{len(costs)} layers keep a second copy of their weight for prefill: {sum(costs):,} bytes"] * bool(costs)


def explain(model: nn.Module, num_tokens: tuple[int, ...] = (1, 16, 128, 1024)) -> Report:
    """Return, for each kind of linear layer, the backend chosen, the kernel at each M, and why not the others.

    One prepared copy serves every number of tokens, so a layer has one backend; inside it the kernel changes with the
    number of tokens M (rows of x), as the columns "M=..." say. On a GPU the column "against dense" says where a dense
    weight was measured to be faster, and by how much: between about 100 and 500 tokens a packed layer may be slower
    than a dense one, which nobody keeps beside it. After `pack_(fuse=True)` the column "fused" names the
    layers that share a launch, or says why they do not.
    """
    for m in num_tokens:
        if m < 1:
            raise ValueError(f"num_tokens={num_tokens}: {m} is no number of tokens, use 1 or more")
    model = unwrapped(model)
    asked_to_fuse = any(layer.fusion for layer in sparse_layers(model).values())
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, module in model.named_modules():
        row: dict[str, Any]
        if isinstance(module, SparseLinear):
            row = _explain_sparse(module, num_tokens)
            if asked_to_fuse:
                row["fused"] = module.fusion
        elif is_linear(module):
            w_NK = weight_NK(module)
            row = {"weight": f"dense {w_NK.shape[0]}x{w_NK.shape[1]} {_short(w_NK.dtype)}", "backend": "torch"}
            if isinstance(module, SideLinear):
                row["weight"] += f", with a side branch of rank {module.rank}"
            row |= {f"M={m}": "dense" for m in num_tokens} | {"why not the others": _why_not_packed(w_NK)}
        else:
            continue
        kind = seen.setdefault(tuple(row.values()), {"first layer": name, "layers": 0, **row})
        kind["layers"] += 1
    notes = [] if seen else ["the model has no linear layer"]
    notes.append("which of dense and sparse is faster here: sparsekit.benchmark(model)")
    return Report("sparsekit explain", list(seen.values()), {}, notes)


def _explain_sparse(layer: SparseLinear, num_tokens: tuple[int, ...]) -> dict[str, Any]:
    layer.prepare_()
    device = layer.prepared[0].device
    chosen = BACKENDS.get(layer.backend)
    others = {
        name: layer.reasons.get(name) or backend.why_not(layer.spec, device) or "it can run, and comes later in 'auto'"
        for name, backend in BACKENDS.items()
        if name != layer.backend
    }
    row: dict[str, Any] = {"weight": _in_words(layer), "backend": layer.backend}
    spec, prepared = layer._prepared_spec, layer.prepared  # of a fused layer: what runs is the product of its group
    row |= {f"M={m}": chosen.kernel(spec, m, device, prepared) for m in num_tokens}
    if verdict := chosen.against_dense(spec, device, prepared):
        row["against dense"] = verdict
    return row | {"why not the others": "; ".join(f"{name}: {reason}" for name, reason in others.items())}


def _in_words(layer: SparseLinear) -> str:
    """Return format, shape and dtype, and the side branch that is packed with the weight."""
    weight = str(replace(layer.spec, in_features=layer.in_features))
    return weight if layer.side is None else f"{weight}, with a side branch of rank {layer.side.rank}"


def _why_not_packed(w_NK: Tensor) -> str:
    """Return whether `pack_` would leave the layer dense by choice; its zeros are only counted where it might."""
    reason = "" if w_NK.device.type == "meta" else why_dense(w_NK, "semi24")
    if reason and FORMATS.get("semi24").count_violations(w_NK)[0] == 0:
        return f"it is 2:4 and stays dense: {reason}"
    return "the layer is not packed"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sparsity_of(weight: Tensor) -> float:
    """Return the share of exact zeros."""
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
