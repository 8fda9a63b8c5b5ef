"""Models and tokenizers by path or hub name, for the commands."""

import os
from pathlib import Path
from typing import Any

import torch

from sparsekit.checkpoint import MANIFEST, load
from sparsekit.doctor import default_dtype, own_dtype_of, parse_dtype, read_config
from sparsekit.files import why_not_writable

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")


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


def hush_warnings() -> None:
    """Keep transformers from logging what is no error."""
    from transformers.utils import logging

    logging.set_verbosity_error()


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


def tokenizer_if_any(name: str) -> Any:
    """Return the tokenizer beside a model, None where there is none."""
    try:
        return load_tokenizer(name)
    except FileNotFoundError:
        return None


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
    """Raise FileNotFoundError where an option names a file that is not there, ValueError where it names a folder."""
    if path is not None and Path(path).is_dir():
        raise ValueError(f"{option} {path} is a folder: name one file, .txt, .jsonl or .parquet")
    if path is not None and not Path(path).is_file():
        raise FileNotFoundError(f"{option} {path}: there is no such file")


def need_model(name: str) -> None:
    """Raise FileNotFoundError where no model of text can be at this place, with all that is missing."""
    folder = Path(name)
    if folder.is_file():
        raise NotADirectoryError(f"MODEL {name} is a file: name the folder that it lies in")
    if folder.is_dir():
        parts = {"config.json": ("config.json",), "weights": WEIGHT_FILES, "tokenizer": TOKENIZER_FILES}
        missing = [part for part, globs in parts.items() if not any(any(folder.glob(glob)) for glob in globs)]
        if missing:
            raise FileNotFoundError(f"MODEL {name} is no whole model, there is no {', no '.join(missing)} in it")
    read_config(name)


def need_writable(path: str, option: str) -> None:
    """Raise ValueError where the folder of an option could not be written, without leaving a trace."""
    folder = Path(path).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option} {path} is a file: name a folder")
    if Path.cwd().is_relative_to(folder.resolve()):
        raise ValueError(f"{option} {path} is the working directory or holds it: name a folder of its own, as ./model")
    if obstacle := why_not_writable(folder):
        raise ValueError(f"{option} {path}: {obstacle}")
