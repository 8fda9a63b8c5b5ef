"""How well a model does on held-out data: perplexity of one that predicts tokens, accuracy of a classifier."""

from dataclasses import dataclass
from typing import Any

import torch

from sparsekit.archs import max_positions
from sparsekit.benchmarking.models import is_causal
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.cli.calibration_file import CalibrationFile
from sparsekit.evaluate import perplexity
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.labels import labelled_batches
from sparsekit.progress import progress_bar

_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")


def is_classifier(model: Any) -> bool:
    """Return whether a model gives one class for each sample."""
    return type(model).__name__.endswith(_CLASSIFIERS)


@dataclass(frozen=True)
class HeldOut:
    """Data to judge a model with.

    Attributes:
        file: text for a language model; rows with labels, or images in folders of their labels, for a classifier.
        source: name of the model, whose image processor prepares images.
        max_length: tokens of a text of a classifier, at most; None for what it reads.
        batch_size: samples of a classifier at a time.
    """

    file: CalibrationFile
    source: str
    max_length: int | None = None
    batch_size: int = 32

    def judge(self, model: Any, tokenizer: Any, progress: bool) -> dict[str, Any]:
        """Return a row of what was found.

        Raises:
            ValueError: the model predicts neither tokens nor classes, or the data do not fit it.
        """
        if is_causal(model):
            data = self.file.texts(model.config, needs_labels=False)
            found = perplexity(model, data, tokenizer, progress=progress)
            return {"perplexity": found.value, "tokens": found.num_tokens, "chunk": found.max_seq_length}
        if not is_classifier(model) or model.config.num_labels < 2:
            raise ValueError(
                f"{self.file.option}: {type(model).__name__} predicts neither the next token nor a class, so there is "
                "nothing to judge it by; leave it out"
            )
        right, num = accuracy(model, self._batches(model, tokenizer), progress)
        return {"accuracy": right / max(num, 1), "samples": num}

    def _batches(self, model: Any, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
        rows: list[dict[str, Any]]
        if self.file.holds_images:
            rows = self.file.images(self.source, model.config, 1 << 40, self.batch_size, seed=0)
            if "labels" not in rows[0]:
                raise ValueError(
                    f"{self.file.option} {self.file.path}: the images must lie in folders with the names of the "
                    f"model's classes, as {next(iter(model.config.label2id))!r}"
                )
        else:
            rows = self.file.texts(model.config, needs_labels=True)
        limits = {"num_samples": 1 << 40, "max_length": self.max_length or max_positions(model) or 512}
        return labelled_batches(rows, model, tokenizer, **limits, batch_size=self.batch_size, seed=0)


def accuracy(model: Any, batches: list[dict[str, torch.Tensor]], progress: bool) -> tuple[int, int]:
    """Return how many samples a classifier gets right, and how many there are."""
    right, num = 0, 0
    with as_in_inference(model), progress_bar("accuracy", len(batches), progress) as bar:
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            answers = run(model, inputs).logits.argmax(dim=-1).cpu()
            right, num = right + int((answers == batch["labels"]).sum()), num + len(answers)
            bar.advance()
    return right, num
