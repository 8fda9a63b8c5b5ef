"""Saving and loading: dense with zeros, which opens anywhere, or packed, in fewer bytes.

A folder appears under its final name whole or not at all. `sparsekit.json` in it lists the weight files with their
SHA-256, so that a truncated or altered checkpoint is refused by name before anything is built.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.errors import CheckpointError
from sparsekit.files import replace_dir
from sparsekit.hf import QUANT_METHOD
from sparsekit.hf.card import write_card
from sparsekit.hf.describe import (
    describe_layers,
    describe_packed_,
    is_pretrained,
    layout_version,
    mark_of_widths,
    widths_of,
)
from sparsekit.nn import dense_layer, side_layers, sparse_layers, unwrapped
from sparsekit.version import __version__

MANIFEST = "sparsekit.json"
STALE = ("model*.safetensors", "model.safetensors.index.json", MANIFEST)
"""What a new checkpoint replaces in a folder that holds an older one; other files there are kept."""


def save(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    packed: bool = True,
    *,
    tokenizer: Any = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write a checkpoint folder: safetensors, `config.json`, a README, and a manifest with digests.

    Args:
        model: a transformers model, or any module (`load` then needs the module to fill).
        save_directory: written beside and renamed into place; a failed save leaves what was there.
        packed: True keeps packed layers packed, in fewer bytes; opening it takes `import sparsekit`.
            False writes them dense with their zeros, for any other tool. Both write a model whose layers are cut to
            sizes that its config cannot say so that opening it takes `import sparsekit`.
        tokenizer: saved into the same folder where given.
        max_shard_size: as in transformers.
    Raises:
        ValueError: `packed=True` and no layer is packed, nor cut to a size that its config cannot say; side branches
            that are not packed, or `packed=False`, which has no place for them; or a peft model, whose adapter and
            base are saved apart.
        OSError: the disk is too full. Nothing was written.
    """
    model = unwrapped(model)
    if hasattr(model, "peft_config") and not is_pretrained(model):
        raise ValueError(
            "this is a peft model: save its adapter with model.save_pretrained(folder), and the base with "
            "sparsekit.save(model.unload(), folder)"
        )
    layers = sparse_layers(model)
    describe_packed_(model)  # layers may have been packed by hand, or through a part of the model
    widths = widths_of(model)
    _refuse_branches(model, packed)
    if packed and not layers and not widths:
        raise ValueError(
            "no layer of the model is packed: call sparsekit.pack_(model) first, or save with packed=False"
        )
    dense_extra = 0 if packed else sum(layer.dense_bytes() - layer.packed_bytes() for layer in layers.values())
    tensors = [*model.parameters(), *model.buffers()]
    bytes_needed = int(1.05 * (sum(tensor.nbytes for tensor in tensors) + dense_extra)) + 2**20
    with replace_dir(Path(save_directory), bytes_needed, STALE) as folder:
        if is_pretrained(model):
            _write_pretrained(model, folder, packed, max_shard_size)
        else:
            _write_module(model, folder, packed)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        write_card(model, folder, layers if packed else {})
        _write_manifest(folder, describe_layers(layers) if packed else {}, widths)


def _refuse_branches(model: nn.Module, packed: bool) -> None:
    """Raise where a side branch would be lost: only a packed layer has a place for it."""
    branches = list(side_layers(model))
    if not packed:
        branches += [name for name, layer in sparse_layers(model).items() if layer.side is not None]
    if branches:
        raise ValueError(
            f"{len(branches)} layers have a side branch, as {branches[0]}, and a dense checkpoint has no place for it: "
            "call sparsekit.pack_(model) and save with packed=True, if their weights are sparse; or "
            "model.save_pretrained (of packed layers after sparsekit.unpack_(model)), whose checkpoints open where "
            "sparsekit is imported; or fold the branches into the weights, with sparsekit.nn.merge_side_(model)"
        )


def load(
    save_directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = "auto",
) -> nn.Module:
    """Return the model in a folder that `save` (or `save_pretrained`) wrote, ready to run.

    Args:
        save_directory: a local folder.
        model: a dense module to load into, for checkpoints of modules that are not transformers models; it becomes
            the loaded model.
        backend: who shall run the packed layers.
        device: where to put the model; the CPU where none is given.
        dtype: of the floating-point weights; "auto" is that of the checkpoint.
    Raises:
        FileNotFoundError: there is no checkpoint in the folder.
        CheckpointError: a file is missing, truncated or altered, or does not belong to the model.
    """
    folder = Path(save_directory)
    if not (folder / "config.json").is_file() and not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"no checkpoint in {folder}: it has neither config.json nor {MANIFEST}")
    manifest = _read_manifest(folder)
    if model is None and (folder / "config.json").is_file():
        loaded = _read_pretrained(folder, manifest, backend, dtype)
    elif model is not None:
        loaded = _read_module(model, folder, manifest, backend)
    else:
        raise ValueError(
            f"config.json is missing in {folder}: fetch it again if the checkpoint is that of a transformers model; "
            "for the weights of a plain module, pass a dense one to load into, as model="
        )
    return loaded if device is None else loaded.to(device)


def dense_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dict with every packed layer dense, zeros included, under the names of the dense model."""
    layers = sparse_layers(model)
    state: dict[str, Tensor] = {}
    for key, tensor in model.state_dict().items():
        owner, _, part = key.rpartition(".")
        if owner not in layers or part == "bias":
            state[key] = tensor
        elif f"{owner}.weight" not in state:
            state[f"{owner}.weight"] = dense_layer(layers[owner]).get_parameter("weight").detach()
    return state


def _write_pretrained(model: Any, folder: Path, packed: bool, max_shard_size: str | int) -> None:
    if packed:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        return
    state = dense_state_dict(model)
    with _undescribed(model):
        model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


@contextmanager
def _undescribed(model: Any) -> Iterator[None]:
    """Hide that the model is packed while its dense form is written; not that it is cut."""
    mark = mark_of_widths(model)
    quantizer = model.__dict__.pop("hf_quantizer", None)
    config = model.config.__dict__.pop("quantization_config", None)
    if mark is not None:
        model.config.quantization_config = mark
    try:
        yield
    finally:
        if quantizer is not None:
            model.hf_quantizer = quantizer
        if config is not None:
            model.config.quantization_config = config


def _write_module(model: nn.Module, folder: Path, packed: bool) -> None:
    from safetensors.torch import save_model

    if packed:
        save_model(model, str(folder / "model.safetensors"))
        return
    from safetensors.torch import save_file

    owners: dict[
        Any, str
    ] = {}  # safetensors refuses tensors that share memory: write one, name the others, as save_model
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, tensor in dense_state_dict(model).items():
        where = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else name
        owner = owners.setdefault(where, name)
        if owner == name:
            tensors[name] = tensor.contiguous()
        else:
            metadata[name] = owner
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})


def _read_pretrained(folder: Path, manifest: dict[str, Any], backend: str, dtype: torch.dtype | str) -> nn.Module:
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read: {error}") from error
    kind = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModel
    described: Any = getattr(config, "quantization_config", None)
    ours = isinstance(described, dict) and described.get("quant_method") == QUANT_METHOD
    said = described if ours else {}
    if manifest and any(manifest.get(key, {}) != said.get(key, {}) for key in ("layers", "widths")):
        raise CheckpointError(f"{folder / 'config.json'} and {MANIFEST} name other layers: fetch the checkpoint again")
    if ours:
        config.quantization_config = {**described, "backend": backend}
    try:
        return kind.from_pretrained(folder, config=config, dtype=dtype)
    except (SafetensorError, EOFError, OSError) as error:
        raise CheckpointError(f"the weights in {folder} are incomplete or damaged: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):  # which transformers' message names when shapes do not fit
            raise
        raise CheckpointError(f"the weights in {folder} have other shapes than its config.json says") from error


def _read_module(model: nn.Module, folder: Path, manifest: dict[str, Any], backend: str) -> nn.Module:
    from safetensors import SafetensorError
    from safetensors.torch import load_model

    layers = manifest.get("layers") or {}
    dense = {name: module for name, module in model.named_modules() if name in layers}
    rest = {key: tensor.clone() for key, tensor in model.state_dict().items() if key.rpartition(".")[0] not in dense}
    try:
        if layers:
            from sparsekit.hf.quantizer import check_described, prepare_layers_, swap_in_empty_

            check_described(layers)
            layers = swap_in_empty_(model, layers, backend)
        load_model(model, str(folder / "model.safetensors"))
        if layers:
            prepare_layers_(model, layers)
    except BaseException as error:
        for name, module in dense.items():
            parent, _, attribute = name.rpartition(".")
            model.get_submodule(parent)._modules[attribute] = module
        model.load_state_dict(rest, strict=False)
        if isinstance(error, SafetensorError | OSError | RuntimeError) and not isinstance(error, CheckpointError):
            text = f"the weights in {folder} are damaged or belong to another module: {error}"
            raise CheckpointError(text) from error
        raise
    return model


def _write_manifest(folder: Path, layers: dict[str, Any], widths: dict[str, list[int]]) -> None:
    files = sorted(folder.glob("*.safetensors"))
    manifest = {
        "sparsekit_version": __version__,
        "layout_version": layout_version(layers, widths),
        "layers": layers,
        **({"widths": widths} if widths else {}),
        "files": {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest after holding every file against it; empty where `save_pretrained` wrote none."""
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        manifest = json.loads(path.read_text())
        files = [(name, found["bytes"], found["sha256"]) for name, found in manifest["files"].items()]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}): fetch the checkpoint again") from error
    for name, num_bytes, digest in files:
        file = folder / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: fetch the checkpoint again")
        if file.stat().st_size != num_bytes:
            raise CheckpointError(
                f"{file} has {file.stat().st_size:,} bytes and should have {num_bytes:,}: it is truncated or "
                f"altered, fetch it again. If you saved over it yourself with save_pretrained, delete {MANIFEST}"
            )
        if _sha256(file) != digest:
            raise CheckpointError(
                f"{file} does not have the digest in {MANIFEST}: it was altered, fetch it "
                f"again. If you saved over it yourself with save_pretrained, delete {MANIFEST}"
            )
    return manifest


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
