"""Calibration data as files hold it: text, text with labels, or images in folders.

- .txt: a text on each line.
- .tsv, .csv: columns, with their names in the first line or, without names, the text first and the label second.
- .jsonl, .parquet: rows with a column of text, or `input_ids`.
- a folder of images, for models of images; the folder that an image lies in is its label.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparsekit.cli.models import need_file
from sparsekit.registry import unknown

TEXT_COLUMNS, LABEL_COLUMNS = ("text", "sentence", "question", "content"), ("label", "labels")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
_DELIMITERS = {".tsv": "\t", ".csv": ","}


@dataclass(frozen=True)
class CalibrationFile:
    """A file, or a folder of images, and which of its columns count.

    Attributes:
        option: by which it was given, for messages.
        text_column, label_column: names, or places from 1 on where the columns have no names; None finds them.
    """

    path: str
    option: str = "--dataset"
    text_column: str | None = None
    label_column: str | None = None

    @property
    def holds_images(self) -> bool:
        """Whether it is a folder."""
        return Path(self.path).is_dir()

    def check(self) -> None:
        """Raise FileNotFoundError or ValueError where it cannot be read."""
        if self.holds_images:
            if not self._images():
                raise ValueError(f"{self.option} {self.path} is a folder without images: name one file of text")
            _pillow(self.option)
            return
        need_file(self.path, self.option)
        suffix = Path(self.path).suffix.lower()
        if suffix not in (".txt", ".jsonl", ".json", ".parquet", *_DELIMITERS):
            raise ValueError(
                f"{self.option} {self.path} ends in {suffix or 'nothing'}: known are .txt .tsv .csv .jsonl .parquet, "
                "and folders of images"
            )
        if suffix == ".txt" and (self.label_column or self.text_column):
            raise ValueError(f"{self.option} {self.path}: a .txt has no columns; use .tsv, .csv, .jsonl or .parquet")

    def texts(self, config: Any, needs_labels: bool) -> Any:
        """Return what `prune_` takes as dataset: the path of a .txt, or rows as {"text": …, "label": …}.

        Args:
            config: of the model, which says what number a label is.
            needs_labels: whether rows must have one; otherwise labels are left out.
        Raises:
            ValueError: a column is missing, or a label is none of the model's.
        """
        if Path(self.path).suffix.lower() == ".txt":
            if needs_labels:
                raise ValueError(
                    f"{self.option} {self.path}: a .txt holds no labels; give text<tab>label in a .tsv, or a .csv, "
                    ".jsonl or .parquet with a column of labels (--labels NAME)"
                )
            return self.path
        rows = list(self._rows())
        if rows and not needs_labels and self.text_column is None and all(isinstance(row, str) for row in rows):
            return rows
        if not rows or not isinstance(rows[0], dict):
            raise ValueError(f"{self.option} {self.path} holds no rows with columns")
        if "input_ids" in rows[0]:
            return rows
        text = self._column(rows[0], self.text_column, TEXT_COLUMNS, "text", "--text-column")
        if not needs_labels:
            return [{"text": str(row[text])} for row in rows]
        label = self._column(rows[0], self.label_column, LABEL_COLUMNS, "labels", "--labels")
        return [
            {"text": str(row[text]), "label": self._number(row[label], config)}
            for row in rows
            if row[label] is not None
        ]

    def images(self, source: str, config: Any, num: int, batch_size: int, seed: int) -> list[dict[str, Any]]:
        """Return batches of images as {"pixel_values": [B, C, H, W]}, with "labels" where all lie in named folders.

        Args:
            source: the model, whose image processor prepares them.
            num: images, at most; drawn at random where there are more.
        """
        from transformers import AutoImageProcessor

        Image = _pillow(self.option)
        processor: Any = AutoImageProcessor.from_pretrained(source)
        paths = self._images()
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))[:num].tolist()
        chosen = [paths[index] for index in order]
        in_folders = all(path.parent != Path(self.path) for path in chosen)
        batches = []
        for start in range(0, len(chosen), batch_size):
            part = chosen[start : start + batch_size]
            opened = [Image.open(path).convert("RGB") for path in part]
            batch = {"pixel_values": processor(images=opened, return_tensors="pt")["pixel_values"]}
            if in_folders and set(path.parent.name for path in chosen) <= set(config.label2id):
                batch["labels"] = torch.tensor([config.label2id[path.parent.name] for path in part])
            batches.append(batch)
        return batches

    def _images(self) -> list[Path]:
        return sorted(path for path in Path(self.path).rglob("*") if path.suffix.lower() in IMAGES)

    def _rows(self) -> Iterator[Any]:
        path = Path(self.path)
        suffix = path.suffix.lower()
        if suffix in _DELIMITERS:
            # In a .tsv a quotation mark is a character like others.
            dialect: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if suffix == ".tsv" else {}
            with path.open(encoding="utf-8", newline="") as file:
                lines = csv.reader(file, delimiter=_DELIMITERS[suffix], **dialect)
                names: list[str] | None = None
                for cells in lines:
                    if not cells:
                        continue
                    if names is None:
                        names = self._names(cells)
                        if names == cells:
                            continue
                    yield dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=False))
        elif suffix == ".parquet":
            from datasets import Dataset

            yield from Dataset.from_parquet(str(path))
        else:
            for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
                try:
                    if line.strip():
                        yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{self.option} {path}: line {number} is no JSON ({error})") from error

    def _names(self, first: list[str]) -> list[str]:
        """Return the names of columns: the first line if it holds one that is looked for, else 1, 2, …"""
        wanted = {self.text_column, self.label_column, *TEXT_COLUMNS} - {None}
        return first if wanted & set(first) else [str(place + 1) for place in range(len(first))]

    def _column(self, row: dict[str, Any], asked: str | None, usual: tuple[str, ...], what: str, option: str) -> str:
        """Return the column that holds the text, or the labels."""
        place = "1" if usual is TEXT_COLUMNS else "2"
        found = asked or next((name for name in (*usual, place) if name in row), None)
        if found is None or found not in row:
            missing = f"no column {asked!r}" if asked else f"no column of {what}"
            raise ValueError(
                f"{self.option} {self.path} has {missing}: it has {', '.join(map(repr, row))}; name it with {option}"
            )
        return found

    def _number(self, label: Any, config: Any) -> int | float:
        """Return the number of a label."""
        if getattr(config, "num_labels", 2) == 1:
            return float(label)
        known: dict[str, int] = getattr(config, "label2id", None) or {}
        if str(label) in known:
            return int(known[str(label)])
        try:
            return int(label)
        except ValueError:
            raise ValueError(f"{self.option} {self.path}: {unknown('label', label, list(known))}") from None


def holds_tokens(data: Any) -> bool:
    """Return whether rows hold the ids of tokens, so that no tokenizer is needed."""
    return isinstance(data, list) and isinstance(data[0], dict) and "text" not in data[0]


def _pillow(option: str) -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ValueError(f"{option} is a folder of images, which Pillow reads: pip install pillow") from error
    return Image
