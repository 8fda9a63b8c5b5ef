"""What structured pruning costs in quality, row by row, at equal budgets and without retraining.

    python bench/finetune_encoder.py --data DIR --task sst2 --out ENCODERS/sst2     # and trec
    python bench/structured_quality.py --data DIR --encoders ENCODERS --json FILE [--cases sst2,wikilm]
                                       [--methods contribution,fisher] [--budgets flops=60%] [--seeds 0,1,2]

Encoders (sst2, trec: accuracy; stsb: Spearman's correlation, see `encoder_tasks`) are calibrated on texts of the
training split, 2,048 of them, which the seed draws; labels go to "fisher" alone. Budgets there are FLOPs at the mean
length of those texts, 60 % and 80 % if none are named. Decoders (wikilm, babyllama_tok105, stories260K; perplexity) are
calibrated on 128 chunks as `bench/quality.py` draws them; budgets are shares of the blocks' parameters to remove, 20 %
and 50 %. Perplexity is that of the validation split; `--split test` once, at the end.

What is scored is the sliced model, and what it costs is counted from its shapes. A run that is in FILE already is not
repeated, so a long table can be made in pieces; the table printed at the end is that of the whole file.
"""

import argparse
import copy
import json
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from encoder_tasks import MAX_LENGTH, Likeness, Task, encoded, pairs, read_task, score
from finetune_encoder import packaged_encoder
from quality import CASES, Case, load_ids, load_model, model_in, random_chunks, text_in
from record import record
from torch import nn

import sparsekit as sk
from sparsekit.archs import find_blocks, find_widths
from sparsekit.budgets import count_flops
from sparsekit.evaluate import perplexity
from sparsekit.methods import METHODS
from sparsekit.report import Report
from sparsekit.targets import is_linear

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "contribution": ("contribution", {}),
    "contribution + hidden": ("contribution", {"hidden": True}),
    "contribution by score": ("contribution", {"selection": "score"}),
    "contribution even": ("contribution", {"allocation": "uniform"}),
    "contribution global": ("contribution", {"allocation": "global"}),
    "kcm": ("kcm", {"r2": "fixed_point"}),
    "kcm density": ("kcm", {"r2": "density"}),
    "fisher": ("fisher", {}),
    "magnitude": ("magnitude_sp", {}),
    "magnitude global": ("magnitude_sp", {"allocation": "global"}),
    "flap": ("flap", {}),
    "wanda_sp": ("wanda_sp", {}),
    "slicegpt": ("slicegpt", {}),
    "depth": ("depth", {}),
    "depth by influence": ("depth", {"criterion": "influence"}),
}
"""Row -> method, and what it changes of the method's defaults."""

ENCODERS = ("sst2", "trec", "stsb")
DECODERS = {case.model: case for case in CASES}
OF_ENCODERS = ["contribution", "contribution by score", "kcm", "kcm density", "fisher", "magnitude", "flap", "wanda_sp"]
OF_DECODERS = ["contribution", "contribution + hidden", "flap", "wanda_sp", "slicegpt", "depth", "magnitude"]
BUDGETS_OF_ENCODERS = ["flops=60%", "flops=80%"]
BUDGETS_OF_DECODERS = ["sparsity=20%", "sparsity=50%"]

GOAL = ("flops=60%", 0.02, 60.0)
"""Of the default on encoders: budget, the most that it may lose of 1, and the seconds that it may take on two cores."""

_EQUAL = 0.005
"""By which a model may be smaller than ours, relatively, and still be compared with it; blocks and hidden dimensions go
in steps, so give budgets that they reach, as sparsity=25%."""

NUM_TEXTS = 2048
NUM_CHUNKS = 128
_BATCH = {"encoder": 32, "decoder": 16}


@dataclass(frozen=True)
class Draw:
    """Calibration data of one seed: arguments of `prune_`, and the mean number of tokens of a sample."""

    arguments: dict[str, Any]
    length: float


@dataclass(frozen=True)
class Subject:
    """What is pruned, and how it is judged.

    Attributes:
        model: the dense model.
        metric: of what `judge` gives.
        judge: model -> number.
        draw: seed, whether labels are wanted -> calibration data.
        wrapped: model -> what a method with labels prunes in its stead.
    """

    model: Any
    metric: str
    judge: Callable[[Any], float]
    draw: Callable[[int, bool], Draw]
    wrapped: Callable[[Any], nn.Module] = lambda model: model


def encoder(root: Path, encoders: Path | None, name: str, num_texts: int) -> Subject:
    """Return the encoder of a task.

    Raises:
        FileNotFoundError: the task, or its model, is not there.
    """
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    task = read_task(root, name)
    folder = packaged_encoder() if name == "stsb" else (encoders or Path()) / name
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"no model in {folder}: make it with bench/finetune_encoder.py, and name --encoders")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind: Any = AutoModelForSequenceClassification if task.num_labels else AutoModel
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    subject = Subject(
        model,
        "accuracy" if task.num_labels else "Spearman",
        lambda found: score(task, found, tokenizer),
        lambda seed, labelled: draw_texts(task, tokenizer, num_texts, seed, labelled),
    )
    return subject if task.num_labels else replace(subject, wrapped=Likeness)


def draw_texts(task: Task, tokenizer: Any, num: int, seed: int, labelled: bool) -> Draw:
    """Return `num` texts of the training split; those of a seed are the same with labels and without."""
    order = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(seed)).tolist()
    rows = [task.train[index] for index in order[: num // len(task.train[0].texts)]]
    texts = pairs(rows)
    ids = tokenizer(texts, truncation=True, max_length=MAX_LENGTH)["input_ids"]
    dataset: list[Any] = texts
    if labelled and task.num_labels:
        dataset = [{"text": row.texts[0], "label": int(row.label)} for row in rows]
    elif labelled:
        parts = [rows[start : start + _BATCH["encoder"] // 2] for start in range(0, len(rows), _BATCH["encoder"] // 2)]
        dataset = [
            encoded(tokenizer, pairs(part)) | {"labels": torch.tensor([row.label for row in part])} for part in parts
        ]
    arguments = {
        "dataset": dataset,
        "tokenizer": tokenizer,
        "num_calibration_samples": len(texts),
        "max_seq_length": MAX_LENGTH,
        "batch_size": _BATCH["encoder"],
        "seed": seed,
    }
    return Draw(arguments, sum(map(len, ids)) / len(ids))


def decoder(root: Path, case: Case, split: str, num_chunks: int, max_tokens: int | None) -> Subject:
    """Return the language model of a case.

    Raises:
        FileNotFoundError: it, or its text, is not there.
    """
    model_dir, train, held_out = model_in(root, case), text_in(root, case.train), text_in(root, case.held_out(split))
    for path in (model_dir, train, held_out):
        if not path.exists():
            raise FileNotFoundError(f"{case.model} needs {path}, which is not there")
    ids, judged = load_ids(train, model_dir), load_ids(held_out, model_dir)

    def draw(seed: int, labelled: bool) -> Draw:
        chunks = random_chunks(ids, case.chunk, seed, num_chunks)
        arguments = {
            "dataset": chunks,
            "num_calibration_samples": len(chunks),
            "batch_size": _BATCH["decoder"],
            "seed": seed,
        }
        return Draw(arguments, case.chunk)

    def judge(model: Any) -> float:
        found = perplexity(model, judged, max_seq_length=case.chunk, max_tokens=max_tokens, progress=False)
        return found.value

    return Subject(load_model(model_dir), "perplexity", judge, draw)


def config_of(row: str, budget: str, length: float | None = None) -> Any:
    """Return the config of a row, for a budget as "flops=60%"."""
    name, fields = ROWS[row]
    kind, _, amount = budget.partition("=")
    config: Any = METHODS.get(name)(constraints={kind: amount}, length=length, **fields)
    return config


def costs(model: nn.Module, length: float) -> dict[str, float]:
    """Return what a model costs, by its shapes: FLOPs of its blocks for a sequence, parameters of blocks and of all."""
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    blocks = [block for chain in find_blocks(model, linears).values() for block in chain]
    in_blocks = sum(parameter.numel() for block in blocks for parameter in model.get_submodule(block).parameters())
    return {
        "flops": count_flops(model, find_widths(model), length).dense,
        "block_params": in_blocks,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def run(subject: Subject, row: str, budget: str, seed: int | None) -> dict[str, Any]:
    """Return what pruning once gives."""
    draw = subject.draw(seed or 0, METHODS.get(ROWS[row][0]).needs_labels)
    config = config_of(row, budget, draw.length)
    model = copy.deepcopy(subject.model)
    pruned = subject.wrapped(model) if config.needs_labels else model
    started, cpu_started = time.perf_counter(), time.process_time()
    plan = sk.prune_(pruned, config, **draw.arguments if config.needs_data else {}, progress=False)
    sk.apply_(pruned, plan)
    taken = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
    before, after = costs(subject.model, draw.length), costs(model, draw.length)
    left = {f"{name}_left": after[name] / before[name] for name in before}
    kept = {name: len(cut.kept) for name, cut in plan.cuts.items()}
    return {"score": subject.judge(model), **left, **taken, "length": draw.length, "kept": kept, "notes": plan.notes}


KEY = ("case", "method", "budget", "seed", "samples", "split", "tokens")
"""What tells rows apart."""


def row_of(rows: list[dict[str, Any]], asked: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row with this key, if it is there."""
    return next((row for row in rows if all(row.get(name) == asked.get(name) for name in KEY)), None)


def measure_case(
    subject: Subject, asked: dict[str, Any], rows: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Do what is not done yet for one case, and append it to `rows` and to the file.

    Args:
        asked: what all its rows have in common.
    """
    wanted = asked | {"method": "dense", "budget": None, "seed": None}
    dense = row_of(rows, wanted)
    if dense is None:
        found = {"score": subject.judge(subject.model), "dense": None, "loss": 0.0}
        dense = record("structured_quality", wanted | {"metric": subject.metric} | found, options.json)
        rows.append(dense)
    is_encoder = asked["case"] in ENCODERS
    sign = -1 if subject.metric == "perplexity" else 1
    for seed in options.seeds:
        for budget in options.budgets or (BUDGETS_OF_ENCODERS if is_encoder else BUDGETS_OF_DECODERS):
            for row in options.methods or (OF_ENCODERS if is_encoder else OF_DECODERS):
                drawn = METHODS.get(ROWS[row][0]).needs_data
                wanted = asked | {"method": row, "budget": budget, "seed": seed if drawn else None}
                if row_of(rows, wanted) is not None:
                    continue
                found = run(subject, row, budget, wanted["seed"])
                against = {"dense": dense["score"], "loss": sign * (dense["score"] - found["score"])}
                done = wanted | {"metric": subject.metric} | found | against
                rows.append(record("structured_quality", done, options.json))


def table(rows: list[dict[str, Any]]) -> Report:
    """Return, for each case, budget and method, the mean and spread over seeds; the best of a budget comes first."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["method"] != "dense":
            groups[tuple(row[name] for name in ("case", "metric", "split", "samples", "budget", "method"))].append(row)
    report = Report("Structured pruning without retraining; losses are against the dense model, the smaller the better")
    for (case, metric, split, samples, budget, method), found in groups.items():
        scores = [row["score"] for row in found]
        means = {
            name: mean(row[key] for row in found)
            for name, key in (
                ("dense", "dense"),
                ("loss", "loss"),
                ("FLOPs left", "flops_left"),
                ("block parameters left", "block_params_left"),
                ("parameters left", "params_left"),
                ("seconds", "seconds"),
                ("CPU seconds", "cpu_seconds"),
            )
        }
        report.rows.append(
            {
                "case": case,
                "split": split,
                "samples": samples,
                "budget": budget,
                "method": method,
                metric: mean(scores),
                "spread": stdev(scores) if len(scores) > 1 else None,
                "seeds": len(scores),
            }
            | means
        )
    report.rows.sort(key=lambda row: (*place_of(row), row["loss"]))
    report.notes += verdicts(report.rows)
    return report


def place_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """Return what rows that may be compared have in common."""
    return tuple(row[name] for name in ("case", "split", "samples", "budget"))


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each budget of a table: the default against the best other method, and the goals."""
    notes = []
    for place, group in groupby(sorted(rows, key=place_of), key=place_of):
        methods = {row["method"]: row for row in group}
        if "contribution" not in methods:
            continue
        ours = methods["contribution"]
        left = "FLOPs left" if place[-1].startswith("flops") else "block parameters left"
        rivals = [row for name, row in methods.items() if not name.startswith("contribution")]
        others = [row for row in rivals if row[left] > ours[left] * (1 - _EQUAL)]
        smaller = [f"{row['method']} ({row[left]:.1%} left)" for row in rivals if row not in others]
        if smaller:
            notes.append(f"{place[0]}, {place[-1]}: smaller than asked for, and so not compared: {', '.join(smaller)}")
        if not others:
            continue
        best = min(others, key=lambda row: row["loss"])
        note = (
            f"{place[0]}, {place[-1]}: contribution loses {ours['loss']:.4f}, {best['method']}, best of the others, "
            f"{best['loss']:.4f}: {'best or equal' if ours['loss'] <= best['loss'] else 'behind'}"
        )
        if place[0] in ENCODERS and place[-1] == GOAL[0]:
            for name, found, most in (("loss", ours["loss"], GOAL[1]), ("seconds", ours["seconds"], GOAL[2])):
                note += f"; goal for {name}, {most:g}: {'met' if found <= most else f'missed, {found:.4g}'}"
        notes.append(note)
    return notes


def cells(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/; demo has wikilm alone")
    parser.add_argument("--json", type=Path, required=True, help="file of rows, read and appended to")
    parser.add_argument("--encoders", type=Path, help="folder with sst2/ and trec/, as finetune_encoder.py makes them")
    parser.add_argument("--cases", type=cells, default=[*ENCODERS, *DECODERS])
    parser.add_argument("--methods", type=cells, help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--budgets", type=cells, help="as flops=60%%, sparsity=20%%, params=5e6")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--samples", type=int, help=f"texts or chunks; {NUM_TEXTS} and {NUM_CHUNKS} if not given")
    parser.add_argument("--split", choices=["valid", "test"], default="valid", help="text of the perplexity")
    parser.add_argument("--tokens", type=int, help="judge perplexity on the first so many, to try things out")
    parser.add_argument("--table", action="store_true", help="prune nothing, print the table of the file")
    options = parser.parse_args(arguments)
    for option, given, known in (
        ("--cases", options.cases, [*ENCODERS, *DECODERS]),
        ("--methods", options.methods or [], list(ROWS)),
    ):
        if wrong := [name for name in given if name not in known]:
            parser.error(f"{option}: {', '.join(wrong)} unknown; there are {', '.join(known)}")
    for budget in options.budgets or []:
        try:
            config_of("magnitude", budget)
        except ValueError as error:
            parser.error(f"--budgets {budget}: {error}")
    return options


def main() -> None:
    options = parsed()
    rows = [json.loads(line) for line in options.json.read_text().splitlines()] if options.json.exists() else []
    missing = []
    for name in options.cases if not options.table else ():
        is_encoder = name in ENCODERS
        samples = options.samples or (NUM_TEXTS if is_encoder else NUM_CHUNKS)
        try:
            if is_encoder:
                subject = encoder(options.data, options.encoders, name, samples)
            else:
                subject = decoder(options.data, DECODERS[name], options.split, samples, options.tokens)
        except FileNotFoundError as error:
            missing.append(f"{name} skipped: {error}")
            continue
        asked = {"case": name, "samples": samples, "split": "dev" if is_encoder else options.split}
        asked["tokens"] = None if is_encoder else options.tokens
        measure_case(subject, asked, rows, options)
    report = table(rows)
    report.notes += missing
    report.print()


if __name__ == "__main__":
    main()
