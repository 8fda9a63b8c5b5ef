"""Before anything is spent: what can run here, how fast this machine is, and which layers would gain.

Nothing is estimated: the layers of the model in question are run here, dense and sparse, on random weights, in the
formats of a packed checkpoint or in the one that is asked for.
"""

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from sparsekit.backends import BACKENDS
from sparsekit.benchmarking import LayerShape, environment, get_shapes, in_format, measure_ceilings, measure_shapes
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.shapes import SHAPES
from sparsekit.benchmarking.timing import noise_notes
from sparsekit.errors import Unsupported
from sparsekit.hf import QUANT_METHOD
from sparsekit.nn import SparseLinear
from sparsekit.nn.side_columns import SideColumns
from sparsekit.progress import progress_bar
from sparsekit.registry import unknown
from sparsekit.report import Report
from sparsekit.targets import Entry, guarded_layers, is_linear, matches_entry, weight_NK

DEFAULT_NUM_TOKENS = (1, 8, 64, 512)


def doctor(
    model: Any = None,
    *,
    dtype: torch.dtype | str | None = None,
    num_tokens: Sequence[int] = DEFAULT_NUM_TOKENS,
    device: torch.device | str | None = None,
    backend: str = "auto",
    format: str = "auto",
    targets: Any = ("Linear",),
    ignore: Any = ("lm_head",),
    max_seconds: float = 120.0,
    progress: bool = True,
) -> Report:
    """Return what can run sparse weights here, this machine's measured ceilings, and the gain of each layer shape.

    Args:
        model: an `nn.Module` (on the meta device too), a transformers config, a local folder or hub name, a name in
            `SHAPES` as "llama-3-8b", or a list of (out_features, in_features). None: the machine alone.
        dtype: of the weights; None takes that of a model in memory, and for a checkpoint the one in which `prune` and
            `bench` load it, see `default_dtype`; bfloat16 where neither says.
        num_tokens: numbers of tokens M to try; 1 is decoding one sequence, hundreds are a prompt.
        device: None takes the model's own, else the GPU where there is one.
        backend: who runs the sparse side.
        format: of the sparse side. "auto" takes for each packed layer its own, blocks at the density that it has, for
            the other layers of such a model the one that most layers have, and semi24 for dense models and shapes.
        targets, ignore: which layers of the model would be pruned; packed ones count as the dense ones they stand for.
        max_seconds: bound on the measurements; shapes left over are named in a note.
        progress: show a bar.
    """
    if any(m < 1 for m in num_tokens) or not num_tokens:
        raise ValueError(f"num_tokens={tuple(num_tokens)}: numbers of tokens of at least 1, as (1, 64)")
    shapes, own_dtype, own_device = _read_model(model, targets, ignore)
    shapes, probed = in_format(shapes, format), in_format(shapes or [LayerShape("probe", 4096, 4096)], format)
    device = torch.device(device or own_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, notes = parse_dtype(dtype), list[str]()
    if dtype is None and not isinstance(model, nn.Module):
        dtype, notes = default_dtype(own_dtype, device)
    dtype = dtype or own_dtype or torch.bfloat16
    formats = ", ".join(dict.fromkeys(shape.format for shape in probed))
    report = Report(f"sparsekit doctor: {formats} weights in {_short(dtype)} on {device}")
    report.summary |= _machine(device, dtype)
    for shape in {shape.format: shape for shape in reversed(probed)}.values():
        report.summary |= _backends(shape, dtype, device, suffix=f", {shape.format}" if ", " in formats else "")
    if not shapes:
        report.notes.append("name a model, or --shapes llama-3-8b, to see what each of its layers would gain here")
        return report
    _measure(report, shapes, tuple(num_tokens), dtype, device, backend, max_seconds, progress)
    report.notes += notes
    return report


def default_dtype(own: torch.dtype | None, device: torch.device) -> tuple[torch.dtype | None, list[str]]:
    """Return the dtype in which every command runs a checkpoint unless told otherwise, and a note where it differs.

    It is the checkpoint's own, but bfloat16 for fp16 on a CPU.
    """
    if own is torch.float16 and device.type == "cpu":
        note = "the checkpoint is float16, which processors emulate slowly: prune, eval, bench and doctor take bfloat16"
        return torch.bfloat16, [f"{note} (--dtype to choose)"]
    return own, []


def own_dtype_of(config: Any, folder: str | os.PathLike[str] | None = None) -> torch.dtype | None:
    """Return the dtype that a transformers config names, or its text model's; else that of the weights in `folder`."""
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if named is not None:
        return parse_dtype(named)
    files = sorted(Path(folder).glob("*.safetensors")) if folder is not None else []
    if not files:
        return None
    with safe_open(files[0], framework="pt") as tensors:
        stored = (tensors.get_slice(key).get_dtype() for key in tensors.keys())
        return next((_STORED_DTYPES[name] for name in stored if name in _STORED_DTYPES), None)


_STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """Return the torch dtype of a name as "bfloat16" or "bf16"; None stays None.

    Raises:
        ValueError: no such floating-point dtype.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    short = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
    if short.get(dtype, dtype) not in names:
        raise ValueError(unknown("dtype", dtype, [*names, *short]))
    return names[short.get(dtype, dtype)]


def _read_model(
    model: Any, targets: Any, ignore: Any
) -> tuple[list[LayerShape], torch.dtype | None, torch.device | None]:
    """Return the shapes that would be pruned, and the model's dtype and device where it has any."""
    if model is None:
        return [], None, None
    if isinstance(model, str) and model.lower() in SHAPES:
        return get_shapes(model), None, None
    folder = model if isinstance(model, str | os.PathLike) else None
    if folder is not None:
        model = read_config(str(folder))
    if isinstance(model, nn.Module):
        layers = _prunable(model, targets, ignore)
        first = next(iter(layers.values()))
        if isinstance(first, SparseLinear):
            own_dtype, own_device = first.spec.dtype, device_of(first)
        else:
            own_dtype, own_device = weight_NK(first).dtype, weight_NK(first).device
        device = None if own_device.type == "meta" else own_device
        return _group(layers), own_dtype if own_dtype.is_floating_point else None, device
    if hasattr(model, "to_dict") and hasattr(model, "model_type"):
        return _group(_prunable(_as_described(model), targets, ignore)), own_dtype_of(model, folder), None
    if isinstance(model, Sequence):
        return _listed(model), None, None
    raise ValueError(
        f"doctor takes a model, a config, a path, a name or a list of shapes, not a {type(model).__name__}"
    )


def _listed(items: Sequence[Any]) -> list[LayerShape]:
    shapes = []
    for item in items:
        if isinstance(item, LayerShape):
            shapes.append(item)
        elif isinstance(item, tuple | list) and len(item) == 2 and all(isinstance(n, int) and n > 0 for n in item):
            shapes.append(LayerShape(f"{item[0]}x{item[1]}", item[0], item[1]))
        else:
            raise ValueError(f"{item!r} is no layer shape: pass (out_features, in_features)")
    return shapes


def _prunable(model: nn.Module, targets: Any, ignore: Any) -> dict[str, nn.Module]:
    """Return what `find_targets` would, also of a model that is packed already or on the meta device."""
    wanted, unwanted = _entries(targets), _entries(ignore)
    linears = {
        name: layer for name, layer in model.named_modules() if is_linear(layer) or isinstance(layer, SparseLinear)
    }
    guarded = guarded_layers(model, linears)
    classes = {base.__name__ for layer in linears.values() for base in type(layer).__mro__}
    reached: set[str] = set()
    for entry in wanted:
        matches = {name for name, layer in linears.items() if matches_entry(entry, layer, name)}
        names_guarded = matches <= guarded and entry not in classes  # a head or router, by name
        reached |= matches if names_guarded else matches - guarded
    found = {
        name: layer
        for name, layer in linears.items()
        if name in reached and not any(matches_entry(entry, layer, name) for entry in unwanted)
    }
    if not found:
        raise ValueError(
            f"targets={wanted}, ignore={unwanted} leave no layer to prune; linear layers here: "
            f"{', '.join(list(linears)[:8]) or 'none'}"
        )
    return found


def _entries(entries: Any) -> list[Entry]:
    return [entries] if isinstance(entries, str) or callable(entries) else list(entries or ())


def _group(layers: dict[str, nn.Module]) -> list[LayerShape]:
    """Return one shape for each N, K, format and side branch; blocks of one size count as one format, with their mean
    number."""
    packed = [layer.spec for layer in layers.values() if isinstance(layer, SparseLinear)]
    usual = Counter(spec.format for spec in packed if spec.block is None).most_common(1)
    format_of_dense = usual[0][0] if usual else "semi24"
    groups: dict[tuple[int, int, str, tuple[int, int] | None, SideColumns | None], list[tuple[str, int]]] = {}
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            key = (layer.out_features, layer.in_features, layer.format, layer.spec.block, layer.side)
            num_blocks = layer.spec.num_blocks or 0
        else:
            N, K = weight_NK(layer).shape
            key, num_blocks = (N, K, format_of_dense, None, None), 0
        groups.setdefault(key, []).append((name.rpartition(".")[2], num_blocks))
    return [
        LayerShape(
            ", ".join(dict.fromkeys(name for name, _ in members)),
            N,
            K,
            len(members),
            format,
            block,
            None if block is None else round(sum(num for _, num in members) / len(members)),
            side,
        )
        for (N, K, format, block, side), members in groups.items()
    ]


def read_config(name: str) -> Any:
    """Return the transformers config of a folder or hub name.

    Raises:
        FileNotFoundError: there is none.
    """
    from transformers import AutoConfig

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):  # no hub name is so
        raise FileNotFoundError(f"no model {name!r}: there is no such folder")
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if Path(name).exists():
            raise FileNotFoundError(f"no config.json that transformers reads in {name}: pass a model folder") from error
        raise FileNotFoundError(
            f"no model {name!r}: it is no local folder, no hub model within reach, and none of the shapes "
            f"{', '.join(SHAPES)}"
        ) from error


def empty_model(config: Any) -> nn.Module:
    """Return the model of a config on the meta device, where it takes no memory."""
    import transformers

    kind = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
    with torch.device("meta"):
        if kind is not None:
            return kind(config)
        try:
            return transformers.AutoModelForCausalLM.from_config(config)
        except ValueError:
            return transformers.AutoModel.from_config(config)


def _as_described(config: Any) -> nn.Module:
    """Return the model of a config on the meta device, with the packed layers that the config describes."""
    model = empty_model(config)
    described = getattr(config, "quantization_config", None) or {}
    described = described if isinstance(described, dict) else described.to_dict()
    if described.get("quant_method") == QUANT_METHOD:
        from sparsekit.hf.quantizer import check_described, swap_in_empty_

        check_described(described.get("layers", {}))
        swap_in_empty_(model, described["layers"])
    return model


def _machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    facts, ceilings = environment(device), measure_ceilings(device)
    where = facts["gpu"] if device.type == "cuda" else f"{facts['cpu']}, {facts['threads']} threads, {facts['isa']}"
    matmul = {f"matmul {name}, GFLOP/s": round(rate, 1) for name, rate in ceilings.matmul_gflop_s.items()}
    return {"machine": where, "memory read, GB/s": round(ceilings.read_gb_s, 1), **matmul}


def _backends(shape: LayerShape, dtype: torch.dtype, device: torch.device, suffix: str) -> dict[str, str]:
    answers = {name: backend.why_not(shape.spec(dtype), device) for name, backend in BACKENDS.items()}
    usable = [name for name, reason in answers.items() if reason is None]
    return {
        f"backend {name}{suffix}": (
            f"no: {reason}" if reason else "yes" + (", chosen by auto" if name == usable[0] else "")
        )
        for name, reason in answers.items()
    }


def _measure(
    report: Report,
    shapes: list[LayerShape],
    num_tokens: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    backend: str,
    max_seconds: float,
    progress: bool,
) -> None:
    cell_seconds = min(1.0, max_seconds / (len(shapes) * len(num_tokens)))
    started = time.perf_counter()
    left_out: list[str] = []
    with progress_bar("measuring", len(shapes) * len(num_tokens), progress) as bar:
        for shape in shapes:
            if time.perf_counter() - started > max_seconds:
                left_out.append(str(shape))
                continue
            try:
                rows = measure_shapes([shape], num_tokens, dtype, device, backend=backend, max_seconds=cell_seconds)
                for row in rows:
                    row["advice"] = advice(row["speedup"])
                    report.rows.append(row)
                    bar.advance(1, f"{shape} M={row['M']}")
            except Unsupported as error:
                report.notes.append(str(error))
    if left_out:
        report.notes.append(f"not measured within {max_seconds:.0f} s: {', '.join(left_out)}")
    if report.rows:
        gains = _gains(report.rows, num_tokens)
        report.summary |= _totals(gains)
        report.numbers["linear_layers"] = [{"M": m, **gain} for m, gain in gains.items()]
        report.notes += noise_notes([row["noise"] for row in report.rows])


def advice(speedup: float) -> str:
    """Return what to do with a layer at one M."""
    return "sparse" if speedup >= 1.05 else "stay dense" if speedup < 1 else "no gain"


def _gains(rows: list[dict[str, Any]], num_tokens: tuple[int, ...]) -> dict[int, dict[str, float]]:
    """Return M -> milliseconds of all measured layers in one pass of the model, dense and sparse, and the speed-up."""
    gains = {}
    for m in num_tokens:
        mine = [row for row in rows if row["M"] == m]
        dense, sparse = (sum(row[f"{side} ms"] * row["count"] for row in mine) for side in ("dense", "sparse"))
        if mine:
            gains[m] = {"dense_ms": dense, "sparse_ms": sparse, "speedup": dense / sparse}
    return gains


def _totals(all_gains: dict[int, dict[str, float]]) -> dict[str, Any]:
    """Return the gains in words, and the verdict."""
    totals = {
        f"linear layers at M={m}": f"{gain['dense_ms']:.4g} ms dense, {gain['sparse_ms']:.4g} ms sparse: "
        f"{gain['speedup']:.2f}x"
        for m, gain in all_gains.items()
    }
    gains = {m: gain["speedup"] for m, gain in all_gains.items()}
    faster = [f"M={m} ({gain:.2f}x)" for m, gain in gains.items() if gain >= 1.05]
    slower = [f"M={m} ({gain:.2f}x)" for m, gain in gains.items() if gain < 1.05]
    if not faster:
        return totals | {"verdict": f"stay dense: no gain at {', '.join(slower)}"}
    return totals | {
        "verdict": f"sparse pays at {', '.join(faster)}" + (f"; not at {', '.join(slower)}" if slower else "")
    }


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
