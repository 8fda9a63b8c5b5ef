"""From what the user has to what the model takes: a list of batches, each a dict for `model(**batch)`."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import max_positions, vocabulary_size
from sparsekit.calibration.text import text_samples

Batch = dict[str, Tensor]

INPUT = "input"
"""Key of the one tensor of a batch for a model that takes it by position."""

_DROPPED = ("labels", "label", "label_ids", "idx")


@dataclass(frozen=True)
class Samples:
    """Calibration data, ready to run.

    Attributes:
        batches: each a dict of tensors with the same leading dimension, on the CPU.
        digest: sha256 of the numbers in them, in order, with their shapes and dtypes.
        note: what is too little about them, or "".
    """

    batches: list[Batch]
    digest: str
    note: str = ""

    @property
    def num_samples(self) -> int:
        return sum(_rows(batch) for batch in self.batches)

    @property
    def length(self) -> int:
        """Tokens of the longest sample."""
        return max(_length(batch) for batch in self.batches)


def load_samples(
    dataset: Any,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    num_samples: int = 128,
    max_length: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
) -> Samples:
    """Return calibration samples from any kind of dataset.

    Args:
        dataset: a list of strings; a list of token tensors [L], [1, L] or [B, L], used as they are and in order; a
            `datasets.Dataset` with a column `text` or `input_ids`; a DataLoader or other iterable of dicts; a path to
            .txt (a text on each line), .jsonl or .parquet. For a plain model, tensors of floats as well.
        model: decides how long a sample may be and how it is fed.
        tokenizer: needed for text only.
        num_samples: samples to use, at most. Text for a causal model is one stream of tokens, cut into so many random
            chunks; text for an encoder is taken a text at a time.
        max_length: tokens in a chunk, at most; never more than the model has positions.
        batch_size: samples of equal length to run together.
        seed: of the generator for the random chunks; torch's global one is not used.
    Raises:
        ValueError: no dataset, an empty one, too few tokens for one chunk, or ids that the model does not have.
        FileNotFoundError: the path leads nowhere.
    """
    for name, value in (
        ("num_calibration_samples", num_samples),
        ("max_seq_length", max_length),
        ("batch_size", batch_size),
    ):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
    first, items, sized = _open(dataset)
    limit = min(max_length, max_positions(model) or max_length)
    if isinstance(first, str):
        rows, num_distinct = text_samples(
            items, model, tokenizer, num_samples=num_samples, length=limit, seed=seed, read_all=sized
        )
    else:
        num_distinct = None
        rows = list(_take_rows((_as_batch(item) for item in items), num_samples))
    _check(rows, model)
    batches = [_for_forward(batch, model) for batch in _group(rows, batch_size)]
    return Samples(batches, _digest(batches), _too_little(rows, num_samples, num_distinct))


def _open(dataset: Any) -> tuple[Any, Iterator[Any], bool]:
    """Return the first item, an iterator over all of them, and whether their number is known."""
    if dataset is None:
        raise ValueError("no dataset: pass dataset=[...texts...] with a tokenizer, or a list of token tensors")
    if isinstance(dataset, str | Path):
        dataset = _read_path(Path(dataset))
    elif isinstance(dataset, Tensor):
        dataset = list(dataset.split(1)) if dataset.dim() > 1 else [dataset]
    elif hasattr(dataset, "keys"):
        splits = [str(key) for key, value in dataset.items() if hasattr(value, "column_names")]
        dataset = [dataset] if not splits else _wrong(f"dataset holds the splits {splits}: pass one of them")
    if not isinstance(dataset, Iterable):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}: pass a list of strings or token tensors, a datasets.Dataset, "
            "a DataLoader, or a path to .txt, .jsonl or .parquet"
        )
    columns = getattr(dataset, "column_names", None)
    if isinstance(columns, list):
        column = next((name for name in ("input_ids", "text") if name in columns), None)
        if column is None:
            raise ValueError(
                f"dataset has the columns {columns}, and neither 'text' nor 'input_ids': rename one to 'text'"
            )
        dataset = dataset.select_columns([column]) if column == "text" else dataset  # type: ignore[attr-defined]
    sized = hasattr(dataset, "__len__")
    items = (_unwrap(item) for item in dataset)
    first = next(items, None)
    if first is None:
        raise ValueError("dataset is empty: 0 samples came, at least 1 is needed")
    return first, chain([first], items), sized


def _unwrap(item: Any) -> Any:
    """Text out of a row `{"text": …}`; everything else as it came."""
    if hasattr(item, "keys") and "input_ids" not in item and isinstance(item.get("text"), str):
        return item["text"]
    return item


def _read_path(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"dataset: there is no file {str(path)!r}. A text itself goes in a list: dataset=[text]"
        )
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if suffix in (".jsonl", ".json"):
        import json

        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    if suffix == ".parquet":
        try:
            from datasets import Dataset
        except ImportError as error:
            raise ValueError("a .parquet dataset is read by the package datasets: pip install datasets") from error
        return Dataset.from_parquet(str(path))
    raise ValueError(f"dataset {path.name!r} ends in {suffix or 'nothing'}: known are .txt, .jsonl and .parquet")


def _as_batch(item: Any) -> Batch:
    """Return one item as a batch with a leading dimension."""
    if isinstance(item, Tensor):
        return {INPUT: _two_dims(item)}
    if isinstance(item, list | tuple) and item and all(isinstance(token, int) for token in item):
        return {INPUT: torch.tensor([item])}
    if isinstance(item, list | tuple) and len(item) >= 1 and isinstance(item[0], Tensor):
        return {INPUT: _two_dims(item[0])}  # (inputs, labels) of a TensorDataset
    if hasattr(item, "keys"):
        if not any(isinstance(item[key], Tensor | list) for key in item.keys()):
            raise ValueError(f"dataset rows hold {sorted(item.keys())} and neither 'text' nor 'input_ids'")
        raw = {
            key: item[key] if isinstance(item[key], Tensor) else torch.tensor(item[key])
            for key in item.keys()
            if key not in _DROPPED and (isinstance(item[key], Tensor) or _is_numbers(item[key]))
        }
        lone = all(value.dim() <= 1 for value in raw.values())
        return {key: value[None] if lone else value for key, value in raw.items()}
    raise ValueError(f"dataset holds a {type(item).__name__}: use strings, token tensors, or dicts with input_ids")


def _is_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
    return isinstance(value, int | float) and not isinstance(value, bool)


def _two_dims(x: Tensor) -> Tensor:
    return x[None] if x.dim() < 2 else x


def _take_rows(batches: Iterable[Batch], num_samples: int) -> Iterator[Batch]:
    left = num_samples
    for batch in batches:
        rows = _rows(batch)
        yield batch if rows <= left else {key: value[:left] for key, value in batch.items()}
        left -= rows
        if left <= 0:
            return


def _group(rows: list[Batch], batch_size: int) -> list[Batch]:
    """Join samples of equal shape, in stable order, into batches of at most `batch_size`."""
    if batch_size == 1:
        return rows
    groups: dict[tuple[Any, ...], list[Batch]] = {}
    for batch in rows:
        groups.setdefault(tuple((key, *value.shape[1:]) for key, value in batch.items()), []).append(batch)
    joined: list[Batch] = []
    for group in groups.values():
        pending = iter(group)
        while part := list(islice(pending, max(1, batch_size // _rows(group[0])))):
            joined.append({key: torch.cat([batch[key] for batch in part]) for key in part[0]})
    return joined


def _check(rows: list[Batch], model: nn.Module) -> None:
    if not any(value.numel() for batch in rows for value in batch.values()):
        raise ValueError("dataset holds 0 tokens: at least one sample of one token is needed")
    vocabulary, positions = vocabulary_size(model), max_positions(model)
    for index, batch in enumerate(rows):
        ids = batch.get("input_ids", batch.get(INPUT))
        if ids is None or not ids.numel():
            continue
        if vocabulary is not None and getattr(model, "main_input_name", "input_ids") == "input_ids":
            if ids.is_floating_point() or ids.dtype == torch.bool:
                raise ValueError(f"sample {index} holds {ids.dtype}, and the model reads token ids: pass int64")
            if ids.dim() != 2:
                raise ValueError(
                    f"sample {index} has the shape {list(ids.shape)}: token ids come as [length] or [samples, length]"
                )
        if ids.is_floating_point():
            continue
        low, high = int(ids.min()), int(ids.max())
        if vocabulary is not None and (low < 0 or high >= vocabulary):
            raise ValueError(
                f"sample {index} holds token ids from {low} to {high}, and the model knows 0 to {vocabulary - 1}: "
                "tokenise with the model's own tokenizer"
            )
        if vocabulary is not None and positions is not None and ids.shape[-1] > positions:
            raise ValueError(
                f"sample {index} holds {ids.shape[-1]} tokens, and the model has {positions} positions: cut it"
            )


def _for_forward(batch: Batch, model: nn.Module) -> Batch:
    """Name a lone tensor for the model's forward, and drop what that forward does not take."""
    parameters = inspect.signature(model.forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    named = {
        ("input_ids" if key == INPUT and "input_ids" in parameters and not value.is_floating_point() else key): value
        for key, value in batch.items()
    }
    out = {key: value for key, value in named.items() if key == INPUT or takes_any or key in parameters}
    out = {key: value if value.is_floating_point() else value.long() for key, value in out.items()}
    return out or _wrong(f"dataset rows hold {sorted(batch)}, and the model takes {sorted(parameters)}")


def _rows(batch: Batch) -> int:
    return next(iter(batch.values())).shape[0]


def _length(batch: Batch) -> int:
    """Tokens of each sample of a batch; 1 where samples are no sequences."""
    x = next((batch[key] for key in ("input_ids", INPUT) if key in batch), next(iter(batch.values())))
    is_sequence = x.dim() == 3 or (x.dim() == 2 and not x.is_floating_point())
    return x.shape[1] if is_sequence else 1


def _split(batch: Batch) -> Iterator[Batch]:
    rows = _rows(batch)
    for i in range(rows):
        yield {key: x[i : i + 1] if x.dim() and x.shape[0] == rows else x for key, x in batch.items()}


def _too_little(rows: list[Batch], asked: int, num_distinct: int | None) -> str:
    """Return a note if fewer samples came than were asked for, or if they repeat what others hold."""
    came = sum(_rows(batch) for batch in rows)
    num_tokens = sum(_rows(batch) * _length(batch) for batch in rows)
    if num_distinct is None:
        different = {_digest([row]): _length(batch) for batch in rows for row in _split(batch)}
        num_distinct = sum(different.values())
    if 2 * num_distinct < num_tokens:
        return (
            f"calibration: the {came} samples hold {num_tokens} tokens, but only {num_distinct} different ones, "
            "for they repeat or overlap: pass more data"
        )
    if came < asked:
        return f"calibration: {came} samples came, where {asked} were asked for: pass more data for a better result"
    return ""


def _digest(batches: list[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for key, value in sorted(batch.items()):
            digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _wrong(message: str) -> Any:
    raise ValueError(message)
