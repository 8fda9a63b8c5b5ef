"""What training left, on its way to the disk: packed, checked, saved, drawn and timed; kept, whatever fails there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekit as sk
from sparsekit.cli.output import Output
from sparsekit.cli.prune import fitting_lengths, saved_report, short_check
from sparsekit.cli.training_view import plot_training
from sparsekit.files import replace_file
from sparsekit.interrupt import uninterrupted
from sparsekit.nn import sparse_layers
from sparsekit.nn.places import replace_layer_
from sparsekit.nn.side import side_layers, without_branch

PLOT, LOG, PLAN = "training.png", "training.jsonl", "plan.safetensors"


class TrainedModel:
    """A trained model and its plan.

    Args:
        model: dense in layout, its removed weights zero, maybe with branches.
        out: folder to write.
        dtype: to save and run in.
    """

    def __init__(self, model: nn.Module, plan: sk.Plan, out: Path, tokenizer: Any, dtype: torch.dtype) -> None:
        self.model, self.plan, self.out, self.tokenizer, self.dtype = model, plan, out, tokenizer, dtype
        self.history: list[dict[str, Any]] = []
        self._is_saved = False

    def finish(self, output: Output, source: str, notes: list[str], backend: str | None) -> None:
        """Pack, check and save.

        Args:
            source: the dense model's name.
            backend: who runs the packed layers; None leaves them dense.
        """
        self.model = self.model.to(self.dtype).eval()
        if backend is not None:
            scales = self.plan.scales or None
            sk.pack_(self.model, self.plan.format or "auto", backend, scales=scales, progress=output.progress)
        report = sk.check(self.model, self.plan)
        report.notes += notes
        output.add("check", report, shown=short_check(report))
        is_packed = bool(sparse_layers(self.model))
        self._save(is_packed)
        output.add("saved", saved_report(self.model, source, str(self.out), is_packed))

    def draw(self, freeze_step: int) -> None:
        """Write the plot of training beside the model."""
        plot_training(self.history, freeze_step, self.out / PLOT)

    def time(self, output: Output) -> None:
        """Time the model against the dense one."""
        report = sk.benchmark(self.model, progress=output.progress, **fitting_lengths(self.model))
        output.add("benchmark", report)

    def _save(self, is_packed: bool) -> None:
        sk.save(self.model, self.out, packed=is_packed, tokenizer=self.tokenizer)
        self.plan.save(self.out / PLAN)
        with replace_file(self.out / LOG) as file:
            file.write_text("".join(json.dumps(line) + "\n" for line in self.history))
        self._is_saved = True

    @contextmanager
    def kept_on_failure(self) -> Iterator[None]:
        """Whatever goes wrong inside, the trained model is in `out` afterwards, and the error says so."""
        try:
            yield
        except BaseException as error:
            with uninterrupted():
                error.add_note(self._kept())
            raise

    def _kept(self) -> str:
        if self._is_saved:
            return f"the trained model is in {self.out}"
        try:
            self._save_dense()
        except Exception as error:  # the first one is what went wrong, and is raised
            return f"the trained model could not be saved in {self.out} either: {error}"
        return (
            f"the trained model is in {self.out}, dense, with zeros: sparsekit.apply_(model, sparsekit.Plan.load("
            f"{str(self.out / PLAN)!r})) and sparsekit.pack_(model) do the rest"
        )

    def _save_dense(self) -> None:
        """Save without branches, which a dense checkpoint has no place for; the plan has them."""
        self.model = sk.unpack_(self.model).to(self.dtype).eval()
        for name, layer in side_layers(self.model).items():
            replace_layer_(self.model, name, without_branch(layer))
        self._save(is_packed=False)
