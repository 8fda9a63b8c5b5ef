"""Three tasks for small encoders: what they are trained and calibrated on, what is held back, how answers are judged.

- sst2: sentiment of a sentence; accuracy on the dev split.
- trec: kind of a question, of six; there is no dev split, so that 600 of the training questions are held back, the same
  ones always.
- stsb: likeness of two sentences; Spearman's correlation of the scores of people with the cosine between the means of
  the last hidden states, on the dev split. No training: the encoder is one for sentences as it is.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from sparsekit.calibration.quiet import as_in_inference

TASKS = ("sst2", "trec", "stsb")
MAX_LENGTH = 64
"""Tokens of a text, at most; few have more than 50."""

_NUM_HELD_BACK = 600
_BATCH = 32


class Row(NamedTuple):
    """A text with its class, or a pair of texts with how alike people find them, 0 to 5."""

    texts: tuple[str, ...]
    label: float


@dataclass(frozen=True)
class Task:
    """Attributes:
    name: one of `TASKS`.
    train: rows to train and calibrate on.
    held_out: rows to judge by.
    num_labels: classes; 0 where there are none.
    """

    name: str
    train: list[Row]
    held_out: list[Row]
    num_labels: int

    @property
    def texts(self) -> list[str]:
        """All texts of the training rows."""
        return [text for row in self.train for text in row.texts]


def read_task(root: Path, name: str) -> Task:
    """Return a task from the folder `data` of `root`.

    Raises:
        FileNotFoundError: it is not there.
    """
    folder = root / "data" / name
    if name == "trec":
        rows = _trec(folder / "train.txt")
        return Task(name, rows[_NUM_HELD_BACK:], rows[:_NUM_HELD_BACK], num_labels=6)
    if name == "sst2":
        return Task(name, _sst2(folder / "train.tsv"), _sst2(folder / "dev.tsv"), num_labels=2)
    return Task(name, _stsb(folder / "stsb-en-train.csv"), _stsb(folder / "stsb-en-dev.csv"), num_labels=0)


def score(task: Task, model: nn.Module, tokenizer: Any) -> float:
    """Return the accuracy, or Spearman's correlation, on the rows that are held out."""
    with as_in_inference(model):
        if task.num_labels:
            rows = sorted(task.held_out, key=lambda row: len(row.texts[0]))  # little padding
            right = sum(
                int((_logits(model, tokenizer, part).argmax(-1) == _classes(part)).sum()) for part in _parts(rows)
            )
            return right / len(rows)
        near = torch.cat([similarities(model, encoded(tokenizer, pairs(part))) for part in _parts(task.held_out)])
    return float(spearmanr(near.double().numpy(), [row.label for row in task.held_out]).statistic)


def pairs(rows: list[Row]) -> list[str]:
    """Return the texts of rows one after the other: both of the first row, both of the second, …"""
    return [text for row in rows for text in row.texts]


def encoded(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return texts as one padded batch."""
    return dict(tokenizer(texts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"))


def similarities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the cosine between the mean hidden states of each two texts of a batch [2n, T], [n]."""
    hidden = model(**batch).last_hidden_state
    real = batch["attention_mask"][..., None].to(hidden)
    means = (hidden * real).sum(dim=1) / real.sum(dim=1)
    return F.cosine_similarity(means[0::2], means[1::2])


class Likeness(nn.Module):
    """An encoder that has a loss: how far cosines of pairs are from what people say. For methods that need labels."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = encoder.config

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None, **more: Tensor) -> Any:
        near = similarities(self.encoder, {"input_ids": input_ids, "attention_mask": attention_mask, **more})
        return _Answer(None if labels is None else F.mse_loss(near, labels.to(near) / 5))


@dataclass(frozen=True)
class _Answer:
    loss: Tensor | None


def _logits(model: nn.Module, tokenizer: Any, rows: list[Row]) -> Tensor:
    return model(**encoded(tokenizer, pairs(rows))).logits


def _classes(rows: list[Row]) -> Tensor:
    return torch.tensor([int(row.label) for row in rows])


def _parts(rows: list[Row]) -> list[list[Row]]:
    return [rows[start : start + _BATCH] for start in range(0, len(rows), _BATCH)]


def _sst2(path: Path) -> list[Row]:
    lines = (line.rsplit("\t", 1) for line in path.read_text(encoding="utf-8").strip().split("\n"))
    return [Row((text,), int(label)) for text, label in lines]


def _trec(path: Path) -> list[Row]:
    """Return questions with the coarse class of theirs, in an order that is random and always the same."""
    lines = [line.split(" ", 1) for line in path.read_text(encoding="latin-1").strip().split("\n")]
    kinds = sorted({kind.split(":")[0] for kind, _ in lines})
    rows = [Row((question,), kinds.index(kind.split(":")[0])) for kind, question in lines]
    random.Random(0).shuffle(rows)
    return rows


def _stsb(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [Row((first, second), float(label)) for first, second, label in csv.reader(file)]
