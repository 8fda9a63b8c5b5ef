"""Models and tokenizers by path or hub name, for the commands."""

import os
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint import MANIFEST, load
from sparsekit.doctor import default_dtype, own_dtype_of, parse_dtype, read_config

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def load_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, list[str]]:
    """Return a model, in evaluation mode, and notes on how it was loaded.

    Args:
        name: a local folder, dense or packed, or a hub name.
        dtype: "auto" is `default_dtype`.
        device: None takes the GPU where there is one.
    Raises:
        FileNotFoundError: there is no such model.
    """
    import transformers

    config = read_config(name)
    target = parse_device(device)
    wanted, notes = parse_dtype(None if dtype == "auto" else dtype), list[str]()
    if wanted is None:
        wanted, notes = default_dtype(own_dtype_of(config, name), target)
    wanted_or_stored: Any = wanted or "auto"
    _hush_transformers()
    if (Path(name) / MANIFEST).is_file():
        return load(name, device=target, dtype=wanted_or_stored).eval(), notes
    kind = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModelForCausalLM
    try:
        model: Any = kind.from_pretrained(name, config=config, dtype=wanted_or_stored)
    except OSError as error:
        raise FileNotFoundError(f"no weights that transformers reads in {name}: {error}") from error
    return model.to(target).eval(), notes


def _hush_transformers() -> None:
    """Switch off the bars of transformers' loading and saving; those of downloads, which may take hours, stay."""
    import huggingface_hub.utils as hub
    from transformers.utils import logging

    shown = not hub.are_progress_bars_disabled()
    logging.disable_progress_bar()
    if shown:
        hub.enable_progress_bars()


def load_tokenizer(name: str) -> Any:
    """Return the tokenizer beside a model.

    Raises:
        FileNotFoundError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no tokenizer in {name}: put tokenizer.json beside the model") from error


def parse_device(device: str | None) -> torch.device:
    """Return the torch device of a name; the GPU where there is one for None.

    Raises:
        ValueError: no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}: use cpu, cuda or cuda:1") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}: torch sees no NVIDIA GPU here, use cpu")
    return found


def bytes_on_disk(folder: str | os.PathLike[str]) -> int | None:
    """Return the bytes of the weight files in a local folder; None where it holds none."""
    path = Path(folder)
    sizes = [file.stat().st_size for glob in WEIGHT_FILES for file in path.glob(glob)] if path.is_dir() else []
    return sum(sizes) or None


def need_file(path: str | None, option: str) -> None:
    """Raise FileNotFoundError where an option names a file that is not there."""
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")
