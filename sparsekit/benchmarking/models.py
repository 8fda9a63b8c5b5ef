"""A packed model against its dense twin on this machine, prefill and decode apart."""

import copy
import inspect
import time
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekit.benchmarking.layers import MODEL_TOLERANCE, LayerShape, agree, layer_row, plain_twin, time_layers
from sparsekit.benchmarking.machine import device_of, environment, free_bytes
from sparsekit.benchmarking.timing import NOISY, Comparison, Timing, noise_notes, synchronize
from sparsekit.errors import SparsekitError
from sparsekit.nn import SparseLinear, sparse_layers
from sparsekit.progress import progress_bar
from sparsekit.report import Report

FASTER, SLOWER = 1.05, 0.95
"""Ratios between these are called equal."""
SHORT_SECONDS = 2.0
"""Rounds go on until this much time has passed: a small model's few rounds say too little."""

Phases = Callable[[nn.Module], dict[str, float]]


def benchmark(
    model: nn.Module,
    *,
    batch_size: int = 1,
    prompt_length: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    inputs: Any = None,
    progress: bool = True,
) -> Report:
    """Return how fast a packed model is here, against the same model with its layers unpacked.

    Both sides get the same inputs and take turns, and their outputs are compared before any clock starts. The dense
    twin shares all but the packed weights with the model, and has side branches folded into its own; where memory does
    not hold it, layers alone are timed, and the report says so.

    Args:
        model: a causal language model (prefill and decode), an encoder (forward only), or any module with `inputs`.
        batch_size: sequences at a time.
        prompt_length: tokens of each prompt, random ones.
        new_tokens: decoding steps, one token of each sequence at a time.
        rounds: passes of each side, more where they are short.
        inputs: a tensor, a tuple of arguments or a dict of keyword arguments of `forward`, for models that do not read
            `input_ids`.
        progress: show a bar.
    Returns:
        Rows for the phases and for each layer shape; the summary has the verdict, speed-ups and bytes. `ok` is False
        if dense and sparse disagree.
    """
    if min(batch_size, prompt_length, rounds) < 1 or new_tokens < 0:
        raise ValueError(f"{batch_size=}, {prompt_length=}, {rounds=}, {new_tokens=}: numbers of at least 1")
    sparse = sparse_layers(model)
    report = Report("sparsekit benchmark: dense against sparse on this machine", summary={"verdict": ""})
    device = device_of(model)
    phases = _phases(model, batch_size, prompt_length, new_tokens, inputs)
    was_training = model.training
    model.eval()
    try:
        comparison = None
        if not sparse:
            comparison = _run_rounds({"dense": model}, phases, rounds, device, progress)
            report.notes.append(
                "no layer of the model is packed, so there is only a dense side: sparsekit.pack_(model)"
            )
        elif sum(layer.dense_bytes() for layer in sparse.values()) > 0.8 * free_bytes(device):
            report.notes.append("memory does not hold the dense twin: layers alone were timed, not the whole model")
        else:
            twin = dense_twin(model)
            _check_outputs(phases, model, twin)
            comparison = _run_rounds({"dense": twin, "sparse": model}, phases, rounds, device, progress)
            del twin
        num_tokens = _tokens_of_phases(comparison, model, batch_size, prompt_length, new_tokens, inputs)
        rows = _layer_rows(sparse, num_tokens, progress)
    except SparsekitError as error:
        report.ok = False
        report.summary["verdict"] = "wrong answers: nothing was timed"
        report.notes.append(str(error))
        return report
    finally:
        model.train(was_training)
    for phase, timings in (comparison or {}).items():
        report.rows.append(_phase_row(phase, num_tokens.get(phase), timings, new_tokens))
    report.rows += rows
    speedups = {phase: timings.ratio("dense", "sparse") for phase, timings in (comparison or {}).items() if sparse}
    report.summary |= {f"{phase} speedup": round(value, 3) for phase, value in speedups.items()}
    report.numbers["speedup"] = speedups
    if comparison and "decode" in comparison:
        for side, timing in comparison["decode"].timings.items():
            report.summary[f"decode tokens/s {side}"] = batch_size * new_tokens / timing.median
    report.notes += noise_notes([timings.noise for timings in (comparison or {}).values()])
    report.summary |= memory_summary(model)
    reason = _reason(sparse, rows, comparison, num_tokens, new_tokens)
    report.summary["verdict"] = verdict(speedups, reason) if speedups else _layer_verdict(sparse, rows)
    if any(timings.noise > NOISY for timings in (comparison or {}).values()):
        best = {
            phase: timings.timings["dense"].min / timings.timings["sparse"].min
            for phase, timings in (comparison or {}).items()
            if sparse
        }
        report.summary["verdict"] = "disturbed by other work, run again; by the best times alone: " + verdict(
            best, reason
        )
    facts = environment(device)
    report.summary["machine"] = ", ".join(
        str(fact) for fact in (facts["gpu"] or facts["cpu"], f"{facts['threads']} threads", f"torch {facts['torch']}")
    )
    return report


def dense_twin(model: nn.Module) -> nn.Module:
    """Return the model with plain layers for its packed ones; all other tensors are shared with it, not copied."""
    sparse = sparse_layers(model)
    memo: dict[int, Any] = {id(layer): plain_twin(layer) for layer in sparse.values()}
    packed = set(sparse.values())
    for module in model.modules():
        if module in packed:
            continue
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                memo[id(tensor)] = tensor
    return copy.deepcopy(model, memo)


def memory_summary(model: nn.Module) -> dict[str, Any]:
    """Return the bytes of the packed layers' weights and of the whole model, now and dense."""
    sparse = sparse_layers(model)
    dense_bytes = sum(layer.dense_bytes() for layer in sparse.values())
    now_bytes = sum(layer.packed_bytes() for layer in sparse.values())
    unique = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}
    total = sum(unique.values())
    facts: dict[str, Any] = {}
    if sparse:
        facts["pruned weights, bytes"] = now_bytes
        facts["pruned weights, bytes dense"] = dense_bytes
        facts["pruned weights, ratio"] = round(now_bytes / dense_bytes, 4)
    return facts | {"model, bytes": total, "model, bytes dense": total - now_bytes + dense_bytes}


def verdict(speedups: dict[str, float], reason: str = "") -> str:
    """Return one honest line: "2.3x faster in decode, 1.1x in prefill", or "stay dense: ..." with the reason."""
    faster = {phase: ratio for phase, ratio in speedups.items() if ratio >= FASTER}
    others = [f"{phase} {ratio:.2f}x" for phase, ratio in speedups.items() if phase not in faster]
    if not faster:
        return f"stay dense: {', '.join(others)}" + (f"; {reason}" if reason else "")
    wins = ", ".join(f"{ratio:.2f}x faster in {phase}" for phase, ratio in faster.items())
    return wins + (f"; not faster: {', '.join(others)}" if others else "")


def _phases(model: nn.Module, batch_size: int, prompt_length: int, new_tokens: int, inputs: Any) -> Phases:
    """Return a function that runs one pass and tells the seconds of each phase."""
    device = device_of(model)
    if inputs is not None:
        named = inputs if isinstance(inputs, dict) else {}
        listed = () if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else (inputs,)
        return lambda side: {"forward": _seconds(device, lambda: side(*listed, **named))}
    config: Any = getattr(model, "config", None)
    vocabulary = getattr(config.get_text_config(), "vocab_size", None) if config is not None else None
    if not vocabulary:
        raise ValueError(
            f"{type(model).__name__} has no vocabulary: pass inputs=, a tensor or the arguments of its forward"
        )
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit and prompt_length + new_tokens > limit:
        raise ValueError(
            f"prompt_length={prompt_length} + new_tokens={new_tokens} is more than the model's {limit} positions"
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (batch_size, prompt_length + new_tokens), generator=generator).to(device)
    prompt = ids[:, :prompt_length]
    takes = inspect.signature(model.forward).parameters
    if not is_causal(model) or new_tokens == 0:
        more = {"decoder_input_ids": prompt} if "decoder_input_ids" in takes else {}
        return lambda side: {"forward": _seconds(device, lambda: side(input_ids=prompt, **more))}
    options: dict[str, Any] = {"use_cache": True} | ({"logits_to_keep": 1} if "logits_to_keep" in takes else {})

    def prefill_and_decode(side: nn.Module) -> dict[str, float]:
        cache: list[Any] = []
        prefill = _seconds(device, lambda: cache.append(side(input_ids=prompt, **options).past_key_values))

        def decode() -> None:
            for step in range(prompt_length, prompt_length + new_tokens):
                cache[0] = side(input_ids=ids[:, step : step + 1], past_key_values=cache[0], **options).past_key_values

        return {"prefill": prefill, "decode": _seconds(device, decode)}

    return prefill_and_decode


def is_causal(model: nn.Module) -> bool:
    """Return whether the model decodes token by token with a cache."""
    config: Any = getattr(model, "config", None)
    can_generate = getattr(model, "can_generate", lambda: False)()
    takes = inspect.signature(model.forward).parameters
    return bool(can_generate and "past_key_values" in takes and not getattr(config, "is_encoder_decoder", False))


def _seconds(device: torch.device, work: Callable[[], Any]) -> float:
    synchronize(device)
    started = time.perf_counter()
    with torch.inference_mode():
        work()
    synchronize(device)
    return time.perf_counter() - started


def _run_rounds(
    sides: dict[str, nn.Module], phases: Phases, rounds: int, device: torch.device, progress: bool
) -> dict[str, Comparison]:
    samples: dict[str, dict[str, list[float]]] = {}
    order = list(sides)
    with progress_bar("benchmark", rounds, progress) as bar:
        for name in order:
            phases(sides[name])  # warm-up
        started, done = time.perf_counter(), 0
        while done < rounds or (time.perf_counter() - started < SHORT_SECONDS and done < 10 * rounds):
            for name in order if done % 2 == 0 else reversed(order):
                for phase, seconds in phases(sides[name]).items():
                    samples.setdefault(phase, {side: [] for side in order})[name].append(seconds)
            done += 1
            bar.advance(1 if done <= rounds else 0)
    return {
        phase: Comparison({side: Timing(tuple(values)) for side, values in by_side.items()})
        for phase, by_side in samples.items()
    }


def _check_outputs(phases: Phases, model: nn.Module, twin: nn.Module) -> None:
    """Compare what both sides answer in the first phase."""
    outputs: list[Tensor] = []
    for side in (twin, model):
        hook = side.register_forward_hook(lambda _m, _a, output: outputs.append(_first_tensor(output)))
        try:
            phases(side)
        finally:
            hook.remove()
    half = len(outputs) // 2
    for step, (dense, sparse) in enumerate(zip(outputs[:half], outputs[half:], strict=True)):
        agree(f"pass {step}", dense, sparse, MODEL_TOLERANCE)


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    if hasattr(output, "logits"):
        return cast(Tensor, output.logits)
    values = output.values() if hasattr(output, "values") else output
    return next(value for value in values if isinstance(value, Tensor))


def _tokens_of_phases(
    comparison: dict[str, Comparison] | None,
    model: nn.Module,
    batch_size: int,
    prompt_length: int,
    new_tokens: int,
    inputs: Any,
) -> dict[str, int]:
    """Rows of x that a layer sees in each phase."""
    if inputs is not None:
        return {}
    if (comparison and "decode" in comparison) or (comparison is None and is_causal(model) and new_tokens):
        return {"prefill": batch_size * prompt_length, "decode": batch_size}
    return {"forward": batch_size * prompt_length}


def _layer_rows(sparse: dict[str, SparseLinear], num_tokens: dict[str, int], progress: bool) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, layer in sparse.items():
        groups.setdefault((layer.spec, layer.side, layer.backend), []).append(name)
    rows = []
    with progress_bar("layers", len(groups) * max(len(num_tokens), 1), progress and bool(groups)) as bar:
        for names in groups.values():
            layers = [sparse[name] for name in names]
            last_names = dict.fromkeys(name.rpartition(".")[2] for name in names)
            shape = LayerShape(", ".join(last_names), layers[0].out_features, layers[0].in_features, len(layers))
            # The model's own layers of one shape are the copies to rotate over; the first sixteen of them.
            dense = [plain_twin(layer) for layer in layers[:16]]
            for phase, m in num_tokens.items():
                timings = time_layers(dense, layers[:16], m)
                rows.append({"what": phase, **layer_row(shape, layers[0], m, timings, with_ceiling=False)})
                bar.advance()
    return rows


def _phase_row(phase: str, num_tokens: int | None, timings: Comparison, new_tokens: int) -> dict[str, Any]:
    steps = new_tokens if phase == "decode" else 1
    row: dict[str, Any] = {"what": phase, "layer": "whole model", "shape": "", "count": 1, "M": num_tokens}
    row |= {f"{side} ms": timing.median / steps * 1e3 for side, timing in timings.timings.items()}
    if "sparse" in timings.timings:
        row["speedup"] = round(timings.ratio("dense", "sparse"), 3)
    return row


def _reason(
    sparse: dict[str, SparseLinear],
    rows: list[dict[str, Any]],
    comparison: dict[str, Comparison] | None,
    num_tokens: dict[str, int],
    new_tokens: int,
) -> str:
    """Say why the model is not faster; the first cause that applies."""
    if not sparse:
        return "no layer is packed"
    if all(layer.backend == "reference" for layer in sparse.values()):
        return "only the reference backend runs here, which multiplies densely (sparsekit.explain says why)"
    phase = "decode" if "decode" in num_tokens else next(iter(num_tokens), "")
    mine = [row for row in rows if row["what"] == phase]
    if not mine:
        return ""
    calls = sum(row["count"] for row in mine)
    dense_ms, sparse_ms = (sum(row[f"{side} ms"] * row["count"] for row in mine) for side in ("dense", "sparse"))
    if comparison and phase in comparison and dense_ms >= FASTER * sparse_ms:
        step = comparison[phase]["dense"].median * 1e3 / (new_tokens if phase == "decode" else 1)
        if dense_ms < 0.5 * step:
            return f"the pruned layers take {dense_ms / step:.0%} of a dense {phase} step, and the rest does not change"
    return (
        f"in {phase} one call of a packed layer takes {1e3 * sparse_ms / calls:.3g} µs on average, of a dense one "
        f"{1e3 * dense_ms / calls:.3g} µs (rows below)"
    )


def _layer_verdict(sparse: dict[str, SparseLinear], rows: list[dict[str, Any]]) -> str:
    """The verdict where the whole model could not be run both ways."""
    if not sparse:
        return "stay dense: no layer is packed, zeros alone save nothing"
    speedups = {}
    for phase in dict.fromkeys(row["what"] for row in rows):
        mine = [row for row in rows if row["what"] == phase]
        speedups[f"the pruned layers' {phase}"] = sum(row["dense ms"] * row["count"] for row in mine) / sum(
            row["sparse ms"] * row["count"] for row in mine
        )
    return verdict(speedups) if speedups else "not timed"
