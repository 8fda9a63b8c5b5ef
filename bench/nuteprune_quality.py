"""What training while pruning gains over pruning at once, row by row, at equal tokens and equal LoRA.

    python bench/nuteprune_quality.py --data DIR --json FILE [--cases wikilm,…] [--methods ours,paper] [--seeds 0,1,2]
                                      [--sparsities 0.2,0.25,0.5] [--steps 150]

DIR holds models/ and data/ as for `bench/quality.py`. All rows of a case and seed train on the same tokens in the same
order, 4,096 of them a step; LoRA of rank 16 on all linear layers of the blocks (but "paper, its own LoRA"), bf16
autocast, and a learning rate that falls to 0 from 3e-3, or from what `TRAINED` says: rows without a teacher want less.
One-shot rows take 128 chunks and train on nothing.

What is judged is the sliced model: perplexity on the validation split, and how often the likeliest next token is the
right one on the first 65,536 tokens of it; for wikilm also perplexity on the test split, which nothing was chosen on.
A row that is in FILE already is not repeated, so a long table can be made in pieces, and by several processes;
`--table` prints that of the file.
"""

import argparse
import copy
import json
import shutil
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from quality import Case, load_ids, load_model, model_in, random_chunks, text_in
from record import record
from structured_quality import DECODERS, cells, costs, numbers
from torch import Tensor

import sparsekit as sk
from sparsekit.evaluate import perplexity
from sparsekit.report import Report

TOKENS_OF_STEP = 4096
NUM_CHUNKS = 128
NUM_ACCURACY = 65_536
_TEXT_ALONE = {"teachers": "none", "kd_weight": 0.0, "ce_weight": 1.0, "learning_rate": 1e-3}
_WHOLE, _HIDDEN = {"hidden": False}, {"hidden": True, "untie": True}
_EQUAL = {"lora_rank": 16, "lora_targets": "all-linear", "hidden": False, "learning_rate": 1e-3}

ONE_SHOT: dict[str, dict[str, Any]] = {"one-shot": {"hidden": False}, "one-shot + hidden": {"hidden": True}}
"""Row -> what it changes of `Contribution`, the best of the one-shot methods in `bench/structured_quality.py`."""

TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "ours": ("", _WHOLE),
    "ours + hidden": ("", _HIDDEN),
    "ours + hidden, text alone": ("", _HIDDEN | _TEXT_ALONE),
    "ours, text alone": ("", _WHOLE | _TEXT_ALONE),
    "ours in two stages": ("", _WHOLE | {"stages": "half"}),
    "ours in two stages, intact teacher": ("", _WHOLE | {"stages": "half", "teachers": "intact"}),
    "gates": ("", {"start": "open"}),
    "gates, intact teacher": ("", {"start": "open", "teachers": "intact"}),
    "gates, paper's teachers": ("", {"start": "open", "teachers": "paper"}),
    "gates, text alone": ("", {"start": "open"} | _TEXT_ALONE),
    "paper": ("paper", _EQUAL),
    "paper, intact teacher": ("paper", _EQUAL | {"teachers": "intact"}),
    "paper, its own LoRA": ("paper", {"learning_rate": 1e-3, "untie": True}),
    "dense, trained on": ("recovery", {"lora_rank": 16, "learning_rate": 1e-4}),
}
"""Row -> recipe of `NutePrune`, and what it changes of it. The teacher of "ours" is the intact model throughout, for
there is no other before the units go; in two stages, at half of the sparsity and then at all of it, the end of the
first may teach in the second."""

METHODS = [
    "one-shot",
    "one-shot + hidden",
    "ours",
    "ours + hidden",
    "ours, text alone",
    "ours in two stages",
    "ours in two stages, intact teacher",
    "gates",
    "gates, intact teacher",
    "gates, paper's teachers",
]
METHODS += ["gates, text alone", "paper", "paper, intact teacher", "dense, trained on"]
SPARSITIES = [0.2, 0.25, 0.5]

GOALS = {0.2: (1.06, 0.97), 0.25: (1.10, 0.95)}
"""Sparsity -> the most that perplexity may be of that of the dense model, and the least that accuracy may be."""

DENSE_TOKENS = {"wikilm": 15_605_760}
"""What the dense model was trained on, where that is known."""

KEY = ("case", "method", "sparsity", "seed", "steps")


class Bench:
    """One model with its texts.

    Raises:
        FileNotFoundError: something is not there.
    """

    def __init__(self, root: Path, case: Case) -> None:
        folder, train = model_in(root, case), text_in(root, case.train)
        splits = {"valid": case.valid} | ({"test": case.test} if case.test else {})
        for path in (folder, train, *(text_in(root, file) for file in splits.values())):
            if not path.exists():
                raise FileNotFoundError(f"{case.model} needs {path}, which is not there")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.case, self.dense, self.ids = case, load_model(folder).to(device), load_ids(train, folder)
        self.judged = {split: load_ids(text_in(root, file), folder) for split, file in splits.items()}
        self.costs = costs(self.dense, case.chunk)

    def judge(self, model: Any) -> dict[str, float]:
        """Return perplexity and accuracy on each split, and what is left by shapes."""
        found: dict[str, float] = {}
        for split, ids in self.judged.items():
            value = perplexity(model, ids, max_seq_length=self.case.chunk, progress=False).value
            found[f"perplexity_{split}"] = value
        found["accuracy_valid"] = accuracy(model, self.judged["valid"][:NUM_ACCURACY], self.case.chunk)
        after = costs(model, self.case.chunk)
        return found | {f"{name}_left": after[name] / before for name, before in self.costs.items()}

    def run(self, method: str, sparsity: float | None, seed: int, steps: int) -> dict[str, Any]:
        """Return what one row gives."""
        model = copy.deepcopy(self.dense)
        started, cpu_started = time.perf_counter(), time.process_time()
        notes = self._one_shot_(model, method, sparsity, seed) if method in ONE_SHOT else None
        if notes is None and method != "dense":
            notes = self._train_(model, method, sparsity, seed, steps)
        taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        return self.judge(model) | taken | {"notes": notes}

    def _one_shot_(self, model: Any, method: str, sparsity: float | None, seed: int) -> list[str]:
        chunks = random_chunks(self.ids, self.case.chunk, seed, NUM_CHUNKS)
        config = sk.Contribution(sparsity=sparsity or 0.0, **ONE_SHOT[method])
        given: dict[str, Any] = {"num_calibration_samples": NUM_CHUNKS, "batch_size": 16, "seed": seed}
        plan = sk.prune_(model, config, dataset=chunks, progress=False, **given)
        sk.apply_(model, plan)
        return plan.notes

    def _train_(self, model: Any, method: str, sparsity: float | None, seed: int, steps: int) -> list[str]:
        recipe, changed = TRAINED[method]
        batch = TOKENS_OF_STEP // self.case.chunk
        chunks = random_chunks(self.ids, self.case.chunk, seed, steps * batch)
        folder = tempfile.mkdtemp()
        fields: dict[str, Any] = {"max_steps": steps, "per_device_train_batch_size": batch, "seed": seed, "bf16": True}
        fields |= {"learning_rate": 3e-3, "output_dir": folder, "save_strategy": "no", "report_to": []}
        fields |= {} if sparsity is None else {"sparsity": sparsity}
        if changed.get("stages") == "half":
            changed = changed | {"stages": [(sparsity or 0.0) / 2]}
        make: Any = getattr(sk.NutePrune, recipe) if recipe else sk.NutePrune
        try:
            plan = sk.prune_(model, make(**fields | changed), dataset=chunks, progress=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        sk.apply_(model, plan)
        return plan.notes


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, length: int) -> float:
    """Return how often the likeliest next token is the right one, over chunks of a text."""
    right = num = 0
    for batch in ids[: len(ids) // length * length].view(-1, length).split(16):
        said = model(input_ids=batch.to(model.device), use_cache=False).logits[:, :-1].argmax(-1)
        right += int((said.cpu() == batch[:, 1:]).sum())
        num += batch[:, 1:].numel()
    return right / num


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(bench: Bench, options: argparse.Namespace) -> None:
    """Do what is not done yet for one case, and append it to the file."""
    asked: list[tuple[str, float | None, int]] = [("dense", None, 0)]
    for seed in options.seeds:
        for sparsity in options.sparsities:
            asked += [(method, sparsity, seed) for method in options.methods if method != "dense, trained on"]
        asked += [("dense, trained on", None, seed)] if "dense, trained on" in options.methods else []
    for method, sparsity, seed in asked:
        steps = options.steps if method in TRAINED else 0
        key = dict(zip(KEY, (bench.case.model, method, sparsity, seed, steps), strict=True))
        if not any(all(row[name] == key[name] for name in KEY) for row in rows_of(options.json)):
            facts = key | {"tokens": steps * TOKENS_OF_STEP} | bench.run(method, sparsity, seed, steps)
            record("nuteprune_quality", facts, options.json)


def table(rows: list[dict[str, Any]]) -> Report:
    """Return mean and spread over seeds for each case, sparsity and method, the best first, and how the goals fared.

    Perplexity and accuracy stand beside those of the dense model, what is left beside its size.
    """
    report = Report("Pruning while training, at equal tokens; what is judged is the sliced model")
    dense = {row["case"]: row for row in rows if row["method"] == "dense"}
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["method"] != "dense":
            groups[row["case"], row["sparsity"] or 0.0, row["method"], row["steps"]].append(row)
    for (case, sparsity, method, steps), found in groups.items():
        base = dense[case]
        scores = [row["perplexity_valid"] for row in found]
        line: dict[str, Any] = {"case": case, "sparsity": sparsity, "method": method, "steps": steps}
        line |= {"perplexity": mean(scores), "spread": stdev(scores) if len(scores) > 1 else None, "seeds": len(scores)}
        line["of dense"] = mean(scores) / base["perplexity_valid"]
        line["accuracy"] = mean(row["accuracy_valid"] for row in found) / base["accuracy_valid"]
        tests = [row["perplexity_test"] for row in found if "perplexity_test" in row]
        line["test, of dense"] = mean(tests) / base["perplexity_test"] if tests else None
        line["blocks left"] = mean(row["block_params_left"] for row in found)
        line["all left"] = mean(row["params_left"] for row in found)
        report.rows.append(line)
    report.rows.sort(key=lambda line: (line["case"], line["sparsity"], line["perplexity"]))
    report.notes += verdicts(report.rows)
    return report


def verdicts(lines: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each goal of the default."""
    notes = []
    for line in lines:
        if line["method"] == "ours" and line["sparsity"] in GOALS:
            most, least = GOALS[line["sparsity"]]
            met = line["of dense"] <= most and line["accuracy"] >= least
            share = ""
            if line["case"] in DENSE_TOKENS:
                share = f", with {line['steps'] * TOKENS_OF_STEP / DENSE_TOKENS[line['case']]:.1%} of its tokens"
            notes.append(
                f"{line['case']} at {line['sparsity']:.0%}: {line['of dense']:.3f} of the dense perplexity (at most "
                f"{most}) and {line['accuracy']:.1%} of its accuracy (at least {least:.0%}){share}: "
                f"{'met' if met else 'missed'}"
            )
    return notes


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/; demo has wikilm alone")
    parser.add_argument("--json", type=Path, required=True, help="file of rows, read and appended to")
    parser.add_argument("--cases", type=cells, default=list(DECODERS))
    parser.add_argument("--methods", help=f"with | between them, of: {' | '.join([*ONE_SHOT, *TRAINED])}")
    parser.add_argument("--sparsities", type=lambda text: [float(each) for each in text.split(",")], default=SPARSITIES)
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--steps", type=int, default=150, help=f"of {TOKENS_OF_STEP} tokens each")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of the file")
    options = parser.parse_args(arguments)
    options.methods = METHODS if options.methods is None else options.methods.split("|")
    for option, given, known in (
        ("--cases", options.cases, list(DECODERS)),
        ("--methods", options.methods, [*ONE_SHOT, *TRAINED]),
    ):
        if wrong := [name for name in given if name not in known]:
            parser.error(f"{option}: {', '.join(wrong)} unknown; there are {', '.join(known)}")
    return options


def main() -> None:
    options = parsed()
    missing = []
    for name in options.cases if not options.table else ():
        try:
            bench = Bench(options.data, DECODERS[name])
        except FileNotFoundError as error:
            missing.append(f"{name} skipped: {error}")
            continue
        measure(bench, options)
    report = table(rows_of(options.json))
    report.notes += missing
    report.print()


if __name__ == "__main__":
    main()
