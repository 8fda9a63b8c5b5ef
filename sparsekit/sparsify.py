"""The drop-in: prune, make it true, pack, check."""

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.check import check
from sparsekit.errors import SparsekitError
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.formats.block import MOST_OF_DENSE, share_of_dense
from sparsekit.methods import METHODS, TRAINED, OneShot, SparseGPT, StructuredMethod, Trained, is_trained, method_config
from sparsekit.methods.grid import is_quantised
from sparsekit.methods.structured import WidthMethod
from sparsekit.nn import unwrapped
from sparsekit.pack import pack_
from sparsekit.patterns import NM, Block, Depth, Pattern, Structured, parse_pattern
from sparsekit.plan import Cut, Plan
from sparsekit.prune import prune_
from sparsekit.reconstruct import reconstruct_
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.surgery import apply_
from sparsekit.targets import find_targets, weight_NK

DEFAULT_PATTERN = NM(2, 4)
T = TypeVar("T")


def sparsify(
    model: nn.Module,
    pattern: str | Pattern | Sequence[str | Pattern] = "2:4",
    *,
    method: Any = None,
    dataset: Any = None,
    tokenizer: Any = None,
    sparsity: float = 0.5,
    constraints: dict[str, Any] | None = None,
    targets: Any = ("Linear",),
    ignore: Any = ("lm_head",),
    num_calibration_samples: int = 128,
    max_seq_length: int = 2048,
    batch_size: int = 1,
    reconstruct: bool = False,
    format: str = "auto",
    backend: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Prune a trained model, pack it, check it, and return the same model object, ready to run.

    Args:
        model: any module made of `nn.Linear` (or GPT-2's `Conv1D`).
        pattern: "2:4", any "N:M", "64x64" (blocks) or "unstructured". 2:4 (and what is sparser in the same
            groups, as "1:4") and blocks whose sides are multiples of 16 have a packed format; weights of the other
            patterns stay dense, with zeros, and `sparsekit.check` says so. "structured" and "depth" take heads and
            channels, or blocks, out of the model, which is then smaller and dense. A list is carried out in turn, as
            ["structured", "2:4"]: first the widths, then 2:4 on what is left.
        method: a name, as "sparsegpt", or a config such as `sparsekit.SparseGPT(pattern="4:8")`, whose pattern
            counts where `pattern` is left at its default; a method that trains, as `sparsekit.AST(max_steps=300)`, too.
            None: SparseGPT when there is a dataset, magnitude when there is none; for "structured" contribution or
            magnitude_sp. For a list of patterns, a list with one for each, or None.
        dataset: calibration data: strings, token tensors, a `datasets.Dataset`, a DataLoader, or a path to
            .txt/.jsonl/.parquet.
        tokenizer: turns strings into tokens.
        sparsity: share of the weights removed, for patterns that do not fix it.
        constraints: a budget instead of a sparsity, for "structured" and "depth": {"flops": "60%"}, {"params": 5e9},
            {"latency_ms": 12.0} or {"speedup": 1.5}.
        targets, ignore: class names, "re:..." on the qualified name, names, or a callable `(module, name) -> bool`.
        num_calibration_samples, max_seq_length, batch_size: how much of the dataset is used, and how.
        reconstruct: after a one-shot method, refit what it kept to what each block gave when it was dense, on the same
            data; see `reconstruct_`, which takes the settings. With a quantised format the weights are rounded after
            that, by SparseGPT.
        format: of the packed weights; "auto" packs what fits. A quantised one ("semi24_int8", "semi24_int4",
            "semi24_fp8") makes SparseGPT round while it prunes, each error made up for by the columns to come, in one
            pass; after the other methods the weights are rounded to nearest. Weights that obey the pattern already
            are then only rounded: by SparseGPT where there is a dataset, to nearest where there is none.
        backend: who runs the packed weights; "auto" for the best here.
        seed: of every random choice. Equal seeds give equal bits, on one machine with one number of threads.
        progress: show progress bars.
    Raises:
        ValueError: a bad argument, by name.
        NonFiniteError: NaN or infinity in weights or activations, by layer.
        SparsekitError: what came out is not what was asked for.

    Whatever is raised, Ctrl-C included, the model is as it was before. For this one copy of the target weights is
    kept in host memory while pruning runs.
    """
    stages = _stages(pattern, method)
    FORMATS.check(format)
    BACKENDS.check(backend)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model={model!r} is a {type(model).__name__}: pass the loaded model, an nn.Module")
    whole, model = model, unwrapped(model)
    given: dict[str, Any] = {
        "dataset": dataset,
        "tokenizer": tokenizer,
        "targets": targets,
        "ignore": ignore,
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "seed": seed,
        "progress": progress,
    }
    if len(stages) > 1 and isinstance(dataset, Iterator):
        raise ValueError(f"pattern={pattern!r} reads the dataset more than once, and an iterator runs dry: pass a list")
    layers = find_targets(model, targets, ignore)
    configs: list[StructuredMethod | Trained | None] = []
    for wanted, asked in stages:
        if isinstance(wanted, Structured | Depth) or _makes_smaller(asked):
            chosen = _choose_structured(asked, wanted, sparsity, constraints, dataset is not None)
            if stages[-1][0] == NM(2, 4) and (asked is None or isinstance(asked, str)):
                chosen = for_packing(chosen, layers)
            configs.append(chosen)
            continue
        configs.append(None)
        if constraints is not None and len(stages) == 1:
            raise ValueError(
                f"constraints={constraints!r}: methods that zero weights take no budget; leave it out and set "
                "sparsity, or use pattern='structured'"
            )
        if backend != "auto" and wanted == NM(2, 4):
            # now, and not after an hour of pruning
            _refuse_unrunnable(layers, "semi24" if format == "auto" else format, backend)
        if reconstruct:
            _refuse_to_reconstruct(asked, dataset, wanted if asked is None and _obey(layers, wanted) else None)
    if reconstruct and configs[-1] is not None:
        raise ValueError("reconstruct=True refits the weights that a mask leaves, and nothing is masked here")
    with restored_on_failure(model) as snapshot:
        plan: Plan | None = None
        for (wanted, asked), config in zip(stages, configs, strict=True):
            if config is None:
                # In a list the sparsity is meant for the patterns that leave it open.
                share = sparsity if len(stages) == 1 or wanted.fixed_sparsity() is None else 0.5
                step = _mask_and_pack_(
                    model, snapshot, wanted, asked, share, batch_size, reconstruct, format, backend, given
                )
            else:
                step = prune_(model, config, batch_size=batch_size, **given)
                apply_(model, step)
                for note in step.notes:
                    warnings.warn(note, stacklevel=2)
            plan = step if plan is None else plan if step is None else merged(plan, step)
        report = check(model, plan)
        if not report.ok:
            raise SparsekitError(f"the result does not hold what was asked for:\n{report}")
    return whole


def _makes_smaller(method: Any) -> bool:
    """Whether this is the config of a method that takes parts out of a model, trained or not."""
    trained = is_trained(method) and isinstance(method.parsed_pattern, Structured)
    return trained or isinstance(method, StructuredMethod)


def _mask_and_pack_(
    model: nn.Module,
    snapshot: Snapshot,
    wanted: Pattern,
    method: Any,
    sparsity: float,
    batch_size: int,
    reconstruct: bool,
    format: str,
    backend: str,
    given: dict[str, Any],
) -> Plan | None:
    """Zero weights of a model, and pack it; return the plan, None where the weights obeyed the pattern already."""
    dataset = given["dataset"]
    layers = find_targets(model, given["targets"], given["ignore"])
    plan: Plan | None = None
    if method is None and _obey(layers, wanted) and not (dataset is not None and is_quantised(format)):
        for name, layer in layers.items():
            if _has_negative_zero(weight_NK(layer)):  # as `w * mask` leaves them; packed they become +0.0
                snapshot.remember(name)
    else:
        config = _choose_method(method, wanted, sparsity, format, has_data=dataset is not None)
        wanted, format = config.parsed_pattern, config.format or format
        if not reconstruct:
            plan = prune_(model, config, batch_size=batch_size, **given)
        else:
            assert isinstance(config, OneShot), "_refuse_to_reconstruct let it pass"
            plan = prune_(model, replace(config, format=None), batch_size=batch_size, **given)
            reconstruct_(model, plan, dense=snapshot.originals(), **given)
            if is_quantised(config.format):
                rounding = SparseGPT(pattern=config.pattern, sparsity=config.sparsity, format=config.format)
                notes, plan = plan.notes, prune_(model, rounding, batch_size=batch_size, **given)
                plan.notes = list(dict.fromkeys([*notes, *plan.notes]))
        apply_(model, plan)
        for note in plan.notes:
            warnings.warn(note, stacklevel=3)
    if format != "auto" or has_packed_format(layers):
        scales = plan.scales if plan else None
        pack_(model, format, backend, layers=layers, scales=scales, progress=given["progress"])
    else:
        warnings.warn(_why_dense(wanted, layers), stacklevel=3)
    return plan


def _stages(pattern: Any, method: Any) -> list[tuple[Pattern, Any]]:
    """Return patterns and methods in the order in which they are carried out.

    Raises:
        ValueError: there is no pattern, one that zeroes weights is not the last, or the methods are not as many.
    """
    if not isinstance(pattern, list | tuple):
        return [(parse_pattern(pattern), method)]
    patterns = [parse_pattern(each) for each in pattern]
    if not patterns:
        raise ValueError("pattern=[] names nothing to do: give one or more, as ['structured', '2:4']")
    methods = [None] * len(patterns) if method is None else method
    if not isinstance(methods, list | tuple) or len(methods) != len(patterns):
        raise ValueError(f"pattern={pattern!r} takes a method for each, in a list of {len(patterns)}, got {method!r}")
    for each in patterns[:-1]:
        if not isinstance(each, Structured | Depth):
            raise ValueError(f"pattern={pattern!r}: {each} must come last, for what goes later would break it")
    cutting = [method for each, method in zip(patterns, methods, strict=True) if isinstance(each, Structured | Depth)]
    if len(cutting) > 1 and not all(_makes_smaller(method) for method in cutting):
        raise ValueError(
            f"pattern={pattern!r} cuts more than once, and one budget does not say how much each time: pass a list of "
            "configs as method, each with its own, as [sk.Depth(sparsity=0.2), sk.Contribution(sparsity=0.2)]"
        )
    return list(zip(patterns, methods, strict=True))


def _choose_structured(
    method: Any, pattern: Pattern, sparsity: float, constraints: dict[str, Any] | None, has_data: bool
) -> StructuredMethod | Trained:
    """Return the config that `method` means; pattern and budget of a config object must be those asked for."""
    if method is None:
        method = default_method(pattern, has_data)
        if method == "magnitude_sp":
            warnings.warn(
                f"no dataset: pruned to {pattern} by magnitude, which costs far more quality than a refit on as few as "
                "128 samples of text. Pass dataset= and tokenizer=",
                stacklevel=3,
            )
    if isinstance(method, str):
        budget = {} if constraints is None else {"constraints": constraints}
        return method_config(method, pattern=str(pattern), sparsity=sparsity, **budget)
    config = method_config(method)
    if config.parsed_pattern != pattern and pattern != DEFAULT_PATTERN:
        raise ValueError(f"pattern={str(pattern)!r}, and method asks for {config.pattern!r}: give both the same")
    if constraints not in (None, config.constraints):
        raise ValueError(f"constraints={constraints!r}, and method has its own budget: give it to the method")
    return config


def for_packing(config: T, layers: Mapping[str, nn.Module]) -> T:
    """Return the config with widths that packed 2:4 weights fill: multiples of 16, or of 8, as the model's own are."""
    widest = math.gcd(16, *(weight_NK(layer).shape[1] for layer in layers.values()))
    if not isinstance(config, WidthMethod) or config.round_to != 1 or widest < 8:
        return config
    return replace(config, round_to=widest)


def default_method(pattern: Pattern, has_data: bool) -> str:
    """Return the name of the best method for a pattern that does not train."""
    if isinstance(pattern, Depth):
        return "depth"
    if isinstance(pattern, Structured):
        return "contribution" if has_data else "magnitude_sp"
    return "sparsegpt" if has_data else "magnitude"


def merged(first: Plan, second: Plan) -> Plan:
    """Return one plan that does what two do in turn, with the name of the last method that zeroes or refits.

    Names of the first are followed to where they are in the model without the layers that the second takes out.
    """
    cuts, curves = dict(first.cuts), dict(first.sensitivity)
    for name, cut in second.cuts.items():
        if cut.kind == "layers":
            cuts, curves = _without_layers(cuts, name, cut), _without_layers(curves, name, cut)
    for name, cut in second.cuts.items():
        before = cuts.get(name)
        cuts[name] = cut if before is None else Cut(before.kept[cut.kept], before.num, cut.kind)
    made_by = replace(
        second.made_by,
        method=f"{first.made_by.method}, {second.made_by.method}",
        config={first.made_by.method: first.made_by.config, **second.made_by.config},
        updates_weights=first.made_by.updates_weights or second.made_by.updates_weights,
    )
    return replace(
        second,
        cuts=cuts,
        made_by=made_by,
        notes=[*first.notes, *second.notes],
        sensitivity=second.sensitivity | curves,
    )


def _without_layers(cuts: dict[str, T], blocks: str, cut: Cut) -> dict[str, T]:
    """Return cuts, or what else there is of layers, by the names that these have when `cut` left the list `blocks`."""
    places = {f"{blocks}.{old}.": f"{blocks}.{new}." for new, old in enumerate(cut.kept.tolist())}
    found: dict[str, T] = {}
    for name, each in cuts.items():
        if not name.startswith(f"{blocks}."):
            found[name] = each
        for old, new in places.items():
            if name.startswith(old):
                found[new + name.removeprefix(old)] = each
    return found


def _choose_method(method: Any, pattern: Pattern, sparsity: float, format: str, has_data: bool) -> OneShot | Trained:
    """Return the config that `method` means; pattern and format of a config object must be those asked for."""
    wanted_format = None if format == "auto" else format
    if method is None:
        if not has_data:
            warnings.warn(
                f"no dataset: pruned to {pattern} by magnitude, which costs far more quality than SparseGPT does with "
                "as few as 128 samples of text. Pass dataset= and tokenizer=",
                stacklevel=3,
            )
        method = default_method(pattern, has_data)
    if isinstance(method, str):
        named = method.strip().lower().replace("-", "_")
        kind = METHODS.get(named) if named in METHODS else None
        if kind is not None and issubclass(kind, StructuredMethod):
            raise ValueError(
                f"method={method!r} makes the pattern {kind.kind}, and pattern={str(pattern)!r} came with it"
            )
        if method.strip().lower() in TRAINED:
            if sparsity != pattern.fixed_sparsity() and sparsity != 0.5:
                raise ValueError(f"sparsity={sparsity}: pattern {pattern} fixes it for method={method!r}; leave it out")
            return method_config(method, pattern=str(pattern), **({"format": wanted_format} if wanted_format else {}))
        return method_config(method, pattern=str(pattern), sparsity=sparsity, format=wanted_format)
    config = method_config(method)
    if config.parsed_pattern != pattern and pattern != DEFAULT_PATTERN:
        raise ValueError(f"pattern={str(pattern)!r}, and method asks for {config.pattern!r}: give both the same")
    if wanted_format is not None and config.format not in (None, wanted_format):
        raise ValueError(f"format={format!r}, and method asks for {config.format!r}: give both the same")
    if is_trained(config):
        config = copy.copy(config)
        config.format = wanted_format or config.format
        return config
    return replace(config, format=wanted_format or config.format)


def _refuse_to_reconstruct(method: Any, dataset: Any, obeyed: Pattern | None) -> None:
    """Raise ValueError where there is nothing to refit to, or nothing to refit with."""
    if obeyed is not None:
        raise ValueError(
            f"reconstruct=True: the weights obey {obeyed} already, so those from before pruning are gone. Call "
            "sparsekit.reconstruct_(model, dense=...) with the original model, and sparsify after it"
        )
    if dataset is None:
        raise ValueError("reconstruct=True needs calibration data: pass dataset= and tokenizer=")
    if isinstance(dataset, Iterator):
        raise ValueError("reconstruct=True reads the dataset more than once, and an iterator runs dry: pass a list")
    trains = method.strip().lower() in TRAINED if isinstance(method, str) else is_trained(method)
    if trains:
        raise ValueError("reconstruct=True is for one-shot methods: this one trains the kept weights already")


def _refuse_unrunnable(layers: dict[str, nn.Module], format: str, backend: str) -> None:
    for layer in layers.values():
        w_NK = weight_NK(layer)
        resolve(backend, WeightSpec(format, w_NK.shape[0], w_NK.shape[1], w_NK.dtype), w_NK.device)


def _obey(layers: dict[str, nn.Module], pattern: Pattern) -> bool:
    """Return whether every weight obeys an N:M pattern already, as after sparse training or another tool."""
    return isinstance(pattern, NM) and all(
        pattern.count_violations(weight_NK(layer) != 0) == 0 for layer in layers.values()
    )


def _has_negative_zero(w_NK: Tensor) -> bool:
    return bool((w_NK.signbit() & (w_NK == 0)).any())


def _why_dense(pattern: Pattern, layers: dict[str, nn.Module]) -> str:
    """Return why no layer of a pruned model was packed, and what to do."""
    cost = "the layers stay dense, with zeros, and cost the same time and memory as before"
    if isinstance(pattern, Block) and pattern.rows % 16 == 0 and pattern.columns % 16 == 0:
        least = min(share_of_dense(weight_NK(layer)) for layer in layers.values())
        if least > MOST_OF_DENSE:
            return (
                f"too few blocks of {pattern} were removed: packed, each layer would take {least:.0%} or more of its "
                f"dense bytes, and above {MOST_OF_DENSE:.0%} none is packed. So {cost}. Raise sparsity for speed"
            )
    return f"no packed format runs {pattern} weights faster: {cost}. Use pattern='2:4' for speed"


def has_packed_format(layers: dict[str, nn.Module]) -> bool:
    """Return whether a packed format holds the weight of any of the layers."""
    return any(
        FORMATS.get(name).count_violations(weight_NK(layer))[0] == 0
        for layer in layers.values()
        for name in FORMATS
        if weight_NK(layer).dtype in FORMATS.get(name).dtypes
    )
