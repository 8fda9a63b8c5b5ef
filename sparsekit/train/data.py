"""From what the user has to what a causal model trains on: chunks of tokens with labels."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from sparsekit.archs import max_positions, vocabulary_size
from sparsekit.calibration.samples import INPUT, _as_batch, _open
from sparsekit.calibration.text import _checked, _token_stream

IGNORED = -100
"""Label of a place that is not learnt."""

Sample = dict[str, Tensor]

_WIDE = ("input_ids", "labels", "attention_mask")
"""What models take as int64, and lies in memory narrower: every process holds the whole corpus."""

_NARROW = (torch.int16, torch.int32)


class TokenSamples(Dataset[Sample]):
    """Samples of one row each: `input_ids` [L], `labels` [L] and whatever else the rows hold.

    Attributes:
        samples: rows as they lie in memory, their token ids in the smallest dtype that holds them; those that are
            handed out are int64.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self.samples[index]
        return {
            key: value.long() if value.dtype in _NARROW and key in _WIDE else value for key, value in sample.items()
        }

    @cached_property
    def digest(self) -> str:
        """Hash of all samples, in their order, whatever dtype they are held in."""
        digest = hashlib.sha256()
        for sample in self.samples:
            for key in ("input_ids", "labels"):
                digest.update(sample[key].long().contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def num_tokens(self) -> int:
        return sum(sample["input_ids"].numel() for sample in self.samples)


def training_samples(dataset: Any, model: nn.Module, tokenizer: Any = None, max_seq_length: int = 2048) -> TokenSamples:
    """Return training samples from any kind of dataset.

    Args:
        dataset: text (a list of strings, a path to .txt, .jsonl or .parquet, a `datasets.Dataset` with `text`), made
            into one stream of tokens and cut into chunks that do not overlap; or token tensors [L], [1, L] or [B, L],
            or dicts with `input_ids`, used as they are.
        model: says how long a sample may be, and which ids it knows.
        tokenizer: needed for text only.
        max_seq_length: tokens of a chunk of text, at most.
    Raises:
        ValueError: no data, too little of it for one chunk, samples that are too long, unlike one another or without
            anything to learn, or ids that the model does not know.
    """
    if isinstance(dataset, TokenSamples):
        return dataset
    first, items, _ = _open(dataset)
    length = min(max_seq_length, max_positions(model) or max_seq_length)
    if isinstance(first, str):
        if tokenizer is None:
            raise ValueError("the dataset is text: pass the model's tokenizer, or token tensors")
        stream = _token_stream(_checked(items), tokenizer, None)
        if not stream.numel():
            raise ValueError("the dataset is empty: it holds no text")
        if stream.numel() < length:
            raise ValueError(
                f"the dataset gave {stream.numel()} tokens, and one sample takes {length}: pass more text, or a "
                f"max_seq_length of at most {stream.numel()}"
            )
        rows = narrowed(stream)[: stream.numel() // length * length].view(-1, length)
        samples = [{"input_ids": row, "labels": row} for row in rows]
    else:
        samples = [sample for item in items for sample in _rows(item)]
    if not samples:
        raise ValueError("the dataset is empty: pass text with a tokenizer, or token tensors")
    _check(samples, model)
    return TokenSamples(samples)


def collate(samples: list[Sample]) -> dict[str, Tensor]:
    """Return a batch; shorter samples are padded at the end, with labels that are not learnt."""
    longest = max(len(sample["input_ids"]) for sample in samples)
    if any(len(sample["input_ids"]) < longest for sample in samples):
        samples = [_padded(sample, longest) for sample in samples]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def _rows(item: Any) -> list[Sample]:
    batch = _as_batch(item)
    ids = batch.pop(INPUT) if INPUT in batch else batch.get("input_ids")
    if ids is None or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"a sample holds {sorted(batch)}: training needs text, or whole numbers as 'input_ids'")
    if ids.dim() != 2:
        raise ValueError(f"a sample has the shape {list(ids.shape)}: token ids come as [length] or [samples, length]")
    batch["input_ids"] = ids = narrowed(ids)
    mask = batch.get("attention_mask")
    if hasattr(item, "keys") and "labels" in item:
        labels = torch.as_tensor(item["labels"]).long()
        if labels.numel() != ids.numel():
            raise ValueError(f"a sample holds {ids.numel()} input_ids and {labels.numel()} labels: give one for each")
        batch["labels"] = narrowed(labels.view(ids.shape))
    else:
        batch["labels"] = ids if mask is None else narrowed(ids.long().masked_fill(mask == 0, IGNORED))
    if mask is not None:
        batch["attention_mask"] = narrowed(mask)
    return [
        {key: value[row] for key, value in batch.items() if value.dim() and len(value) == len(ids)}
        for row in range(len(ids))
    ]


def narrowed(numbers: Tensor) -> Tensor:
    """Return whole numbers in int16 where that holds them all, else in int32 or int64; others as they are."""
    if numbers.is_floating_point() or numbers.dtype == torch.bool:
        return numbers
    numbers = numbers if numbers.dtype.is_signed else numbers.long()  # torch compares few unsigned ones
    low, high = (int(end) for end in numbers.aminmax()) if numbers.numel() else (0, 0)
    fits = (dtype for dtype in _NARROW if torch.iinfo(dtype).min <= low and high <= torch.iinfo(dtype).max)
    return numbers.to(next(fits, torch.int64))


def _padded(sample: Sample, length: int) -> Sample:
    missing = length - len(sample["input_ids"])
    padded = {
        key: F.pad(value, (0, 0) * (value.dim() - 1) + (0, missing), value=IGNORED if key == "labels" else 0)
        for key, value in sample.items()
    }
    if "attention_mask" not in sample:
        padded["attention_mask"] = (torch.arange(length) < length - missing).long()
    return padded


def _check(samples: list[Sample], model: nn.Module) -> None:
    vocabulary, positions = vocabulary_size(model), max_positions(model)
    for index, sample in enumerate(samples):
        if sample.keys() != samples[0].keys():
            raise ValueError(
                f"sample {index} holds {sorted(sample)}, and sample 0 {sorted(samples[0])}: give all of them the same"
            )
        ids, labels = sample["input_ids"], sample["labels"][1:]
        learnt = labels[labels != IGNORED]
        if not learnt.numel():
            raise ValueError(f"sample {index} of {ids.numel()} tokens has none to predict from others: leave it out")
        for name, numbers in (("token ids", ids), ("labels", learnt)):
            low, high = int(numbers.min()), int(numbers.max())
            if vocabulary is not None and (low < 0 or high >= vocabulary):
                raise ValueError(
                    f"sample {index} holds {name} from {low} to {high}, and the model knows 0 to {vocabulary - 1}: "
                    "tokenise with the model's own tokenizer"
                )
        if positions is not None and ids.numel() > positions:
            raise ValueError(f"sample {index} holds {ids.numel()} tokens, the model has {positions} positions: cut it")
