"""Labelled data, for the methods that cannot do without."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsekit.archs import max_positions
from sparsekit.calibration.samples import Batch, load_samples

_LABELS = ("labels", "label", "label_ids")
_TEXTS = ("text", "sentence", "question", "content")
_OF_TOKENS = {"input_ids", "token_type_ids"}


def labelled_batches(
    dataset: Any, model: nn.Module, tokenizer: Any, *, num_samples: int, max_length: int, batch_size: int, seed: int
) -> list[Batch]:
    """Return batches with labels, padded, in random order.

    Batches of a DataLoader are used as they are. A causal language model needs no labels beside its tokens.

    Args:
        dataset: rows (dicts) with "labels" or "label", and "input_ids" or a "text" (also "sentence"); a DataLoader of
            batches of such.
        model: what is to be pruned.
        tokenizer: for rows of text, and for its padding token.
        num_samples: rows to use, at most.
        max_length: tokens of a text, at most.
        batch_size: rows in a batch.
        seed: of the order, and of the choice where there are more rows.
    Raises:
        ValueError: there are no labels, or no rows.
    """
    if (
        isinstance(dataset, str | Path)
        or not isinstance(dataset, Iterable)
        or not _has_fields(first := _first(dataset))
    ):
        if not _is_causal(model):
            raise ValueError(_no_labels(dataset))
        samples = load_samples(
            dataset,
            model,
            tokenizer,
            num_samples=num_samples,
            max_length=max_length,
            batch_size=batch_size,
            seed=seed,
        )
        return [_with_labels(batch, model) for batch in samples.batches]
    if _is_batch(first):
        return list(_whole_batches(dataset, model, num_samples))
    rows = list(dataset)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_samples].tolist()
    limit = min(max_length, max_positions(model) or max_length)
    samples_of_rows = (_sample(rows[index], tokenizer, limit) for index in order)
    parts = iter(lambda: list(islice(samples_of_rows, batch_size)), [])
    if len({any(key in row for key in _LABELS) for row in rows}) > 1:
        raise ValueError(
            "some rows of the dataset have labels, and some have none: add 'labels' to each, or leave those without out"
        )
    return [_with_labels(_padded(part, tokenizer), model) for part in parts]


def _first(dataset: Iterable[Any]) -> Any:
    if (first := next(iter(dataset), None)) is None:
        raise ValueError("dataset is empty: 0 rows came, at least 1 is needed")
    return first


def _has_fields(row: Any) -> bool:
    return isinstance(row, Mapping) or hasattr(row, "keys")


def _no_labels(dataset: Any) -> str:
    return (
        f"dataset is a {type(dataset).__name__} without labels, and this method learns from labels: pass rows as "
        "{'text': ..., 'label': ...}, or use a method that needs none, as 'contribution' or 'kcm'"
    )


def _is_causal(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForCausalLM") or type(model).__name__.endswith("LMHeadModel")


def _is_batch(row: Mapping[str, Any]) -> bool:
    """Whether a row is a batch of rows already: of token ids [B, L], or of inputs with a label for each."""
    ids, label = row.get("input_ids"), next((row[key] for key in _LABELS if key in row), None)
    return isinstance(ids, Tensor) and ids.dim() == 2 or isinstance(label, Tensor) and label.dim() == 1 and ids is None


def _whole_batches(dataset: Iterable[Any], model: nn.Module, num_samples: int) -> Iterator[Batch]:
    num = 0
    for batch in dataset:
        yield _with_labels({key: value for key, value in batch.items() if isinstance(value, Tensor)}, model)
        num += len(next(iter(batch.values())))
        if num >= num_samples:
            return


def _sample(row: Mapping[str, Any], tokenizer: Any, limit: int) -> Batch:
    """Return the inputs of one row without padding, and its label."""
    found = next((row[key] for key in _LABELS if key in row), None)
    if isinstance(found, str):
        raise ValueError(f"dataset has the label {found!r}: pass numbers, as model.config.label2id has them")
    label = {} if found is None else {"labels": torch.as_tensor(found)}
    text = next((row[key] for key in _TEXTS if isinstance(row.get(key), str)), None)
    if text is None:
        inputs = {key: torch.as_tensor(value) for key, value in row.items() if key not in _LABELS}
    elif tokenizer is None:
        raise ValueError(
            "dataset holds text, which needs a tokenizer: pass tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    else:
        encoded = tokenizer(text, truncation=True, max_length=limit)
        inputs = {key: torch.as_tensor(value) for key, value in encoded.items()}
    real = inputs.pop("attention_mask", None)
    for key in _OF_TOKENS & inputs.keys():
        tokens = inputs[key].flatten()
        inputs[key] = (tokens if real is None else tokens[real.flatten() == 1])[:limit]
    return inputs | label


def _padded(samples: list[Batch], tokenizer: Any) -> Batch:
    """Return one batch, each sample padded at its end."""
    if "input_ids" not in samples[0]:
        return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    fillers = {"input_ids": getattr(tokenizer, "pad_token_id", None) or 0, "labels": -100}
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    longest = int(lengths.max())
    batch = {"attention_mask": (torch.arange(longest) < lengths[:, None]).long()}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if values[0].dim():
            values = [F.pad(value, (0, longest - len(value)), value=fillers.get(key, 0)) for value in values]
        batch[key] = torch.stack(values)
    return batch


def _with_labels(batch: Batch, model: nn.Module) -> Batch:
    """Return the batch with "labels"; those of a causal language model are its tokens, unless it has one for each."""
    found = next((batch.pop(key) for key in _LABELS if key in batch), None)
    if _is_causal(model) and (found is None or found.shape != batch["input_ids"].shape):
        found = batch["input_ids"].clone()
        if "attention_mask" in batch:
            found[batch["attention_mask"] == 0] = -100
    if found is None:
        raise ValueError(
            f"dataset rows hold {sorted(batch)}, and this method learns from labels: add 'labels' to each, or use a "
            "method that needs none, as 'contribution' or 'kcm'"
        )
    num_labels = getattr(getattr(model, "config", None), "num_labels", None) or 1
    if found.dim() == 1 and num_labels > 1:
        if found.is_floating_point():
            raise ValueError(f"dataset has the label {float(found[0])}, and the model's are 0 to {num_labels - 1}")
        wrong = found[(found < 0) & (found != -100) | (found >= num_labels)]
        if len(wrong):
            raise ValueError(f"dataset has the label {int(wrong[0])}, and the model knows 0 to {num_labels - 1}")
    return {**batch, "labels": found}
