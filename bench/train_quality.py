"""What sparse training wins back, row by row, at equal token budgets.

    python bench/train_quality.py --data DIR --json FILE [--models wikilm] [--rows ast,fixed] [--seeds 0,1,2]
                                  [--learning-rates 1e-3,2e-3] [--steps 160] [--batch 24] [--splits valid]

`DIR` is laid out as for `bench/quality.py`. Every run starts from the same dense model, reads the same number of tokens
of the training split in an order that the seed decides, and is judged on the validation split (`--splits valid,test`
once, at the end, where there is a test text). Each row has its own best learning rate: the one with the lowest mean
over the seeds that all rates share. A run that is in FILE already is not repeated, so a long table can be made in
pieces; the table printed at the end is that of the whole file. `dense` is the dense model trained on for as many
tokens.
"""

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from quality import CASES, Case, load_ids, load_model, model_in, random_chunks, text_in
from record import record
from torch import Tensor
from transformers import Trainer, TrainingArguments

import sparsekit as sk
from sparsekit.evaluate import perplexity
from sparsekit.masks import Mask
from sparsekit.patterns import NM
from sparsekit.report import Report
from sparsekit.targets import find_targets, weight_NK
from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.data import collate, training_samples


def random_masks(model: Any, seed: int) -> sk.Plan:
    """Return 2:4 masks drawn without a look at the weights: the worst start that there is."""
    generator = torch.Generator().manual_seed(seed)
    scores = {
        name: torch.rand(weight_NK(layer).shape, generator=generator) for name, layer in find_targets(model).items()
    }
    return sk.Plan({name: Mask("2:4", NM(2, 4).project(score)) for name, score in scores.items()})


FIXED: dict[str, Any] = {"mask_update_steps": 0, "masked_decay": 0.0}
LAST_THIRD: dict[str, Any] = {"quantise_ratio": 1 / 3, "mask_freeze_ratio": 1 / 3}
LAST_HALF: dict[str, Any] = {"quantise_ratio": 0.5, "mask_freeze_ratio": 0.5}
ROWS: dict[str, dict[str, Any]] = {
    "ast": {},
    "ast + slorb": {"slorb_group": 16},
    "ast + slorb with X trained": {"slorb_group": 16, "slorb_train_x": True},
    "fixed mask": FIXED,
    "static decay": {"masked_decay_warmup": 0.0},
    "no distillation": {"kd_weight": 0.0},
    "naive": FIXED | {"kd_weight": 0.0},
    "ast from magnitude": {"start": "magnitude"},
    "fixed mask from magnitude": FIXED | {"start": "magnitude"},
    "ast from a random mask": {"start": random_masks},
    "fixed mask from a random mask": FIXED | {"start": random_masks},
    "decay in the gradient": {"masked_decay_kind": "gradient"},
    "decay of the paper": {"masked_decay_kind": "paper"},
    "no decay": {"masked_decay": 0.0},
    "no hysteresis": {"hysteresis": 0.0},
    "hysteresis 0.05": {"hysteresis": 0.05},
    "hysteresis 0.6": {"hysteresis": 0.6},
    "temperature 1": {"temperature": 1.0},
    "no freeze": {"mask_freeze_ratio": 0.0},
    "KL alone": {"kd_weight": 1.0},
    "reverse KL": {"kd_kind": "reverse_kl"},
    "square head": {"square_head_weight": 0.1},
    "int4 in training": {"format": "semi24_int4"},
    "int4 in training + slorb": {"format": "semi24_int4", "slorb_group": 16},
    "int4 in the last half + slorb": LAST_HALF | {"format": "semi24_int4", "slorb_group": 16},
    "int4 in the last third + slorb": LAST_THIRD | {"format": "semi24_int4", "slorb_group": 16},
}
"""Row -> what it changes of `sk.AST`'s defaults. "dense" stands beside them. A start may be made of model and seed."""

ONE_SHOT: dict[str, Any] = {
    "SparseGPT one shot": sk.SparseGPT(),
    "ALPS one shot": sk.ALPS(),
    "magnitude one shot": sk.Magnitude(),
}
"""Row -> method without training; learning rate, steps and batch mean nothing to it."""


def arguments_of(row: str) -> dict[str, Any]:
    """Return all arguments of AST that a row runs with, those that it leaves at their defaults as well."""
    if row not in ROWS:
        return {}
    own = {name: value.__name__ if callable(value) else value for name, value in ROWS[row].items()}
    given = {known.name for known in dataclasses.fields(TrainingArguments)}
    known = {name: value for name, value in ROWS[row].items() if not callable(value)}
    fields = ASTConfig(output_dir="unused", max_steps=1, **known).own_fields()
    return {name: value for name, value in (fields | own).items() if name not in given}


def train_dense_(model: Any, chunks: list[Tensor], args: TrainingArguments) -> None:
    data = training_samples(chunks, model)
    Trainer(model=model, args=args, train_dataset=data, data_collator=collate).train()


def run(
    case: Case, root: Path, row: str, options: argparse.Namespace, seed: int, rate: float, splits: list[str]
) -> list[dict[str, Any]]:
    """Train once, and append a row for each split to the file and return them."""
    model_dir = model_in(root, case)
    model = load_model(model_dir)
    train = load_ids(text_in(root, case.train), model_dir)
    chunks = list(train[: train.numel() // case.chunk * case.chunk].view(-1, case.chunk))
    shared: dict[str, Any] = {
        "output_dir": str(options.work / f"{case.model}-{row.replace(' ', '-')}-{seed}-{rate}"),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": rate,
        "seed": seed,
        "save_strategy": "no",
        "bf16": options.bf16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "logging_steps": options.steps,
    }
    started = time.perf_counter()
    if row in ONE_SHOT:
        plan = sk.prune_(
            model, ONE_SHOT[row], dataset=random_chunks(train, case.chunk, seed), seed=seed, progress=False
        )
    elif row == "dense":
        extra = {"lr_scheduler_type": "cosine", "warmup_steps": 0.05, "adam_beta2": 0.95, "report_to": "none"}
        train_dense_(model, chunks, TrainingArguments(**shared, **extra, remove_unused_columns=False))
        plan = None
    else:
        own = dict(ROWS[row])
        if callable(own.get("start")):
            own["start"] = own["start"](model, seed)
        plan = sk.prune_(model, ASTConfig(**shared, **own), dataset=chunks, progress=False)
    seconds = time.perf_counter() - started
    rows = []
    for split in splits:
        held_out = load_ids(text_in(root, case.held_out(split)), model_dir)
        found = perplexity(model, held_out, max_seq_length=case.chunk, progress=False)
        about = {
            "model": case.model,
            "row": row,
            "seed": seed,
            "learning_rate": rate,
            "steps": options.steps,
            "batch": options.batch,
            "tokens": options.steps * options.batch * case.chunk,
            "split": split,
            "arguments": arguments_of(row),
            "bf16": options.bf16,
            "perplexity": found.value,
            "seconds": seconds,
            "sparsity": None if plan is None else plan.sparsity,
            "threads": torch.get_num_threads(),
        }
        rows.append(record("train_quality", about, options.json))
    return rows


GROUP = ("model", "row", "steps", "batch", "bf16", "arguments")
KEY = (*GROUP, "seed", "learning_rate")


def table(rows: list[dict[str, Any]]) -> Report:
    """Return, for each model, budget and row, the mean and spread over seeds at the row's best learning rate."""
    runs: dict[str, dict[float, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        group = json.dumps([row.get(name) for name in ("model", "split", "tokens", "row", *GROUP)])
        runs[group][row["learning_rate"]][row["seed"]] = row["perplexity"]
    report = Report("Perplexity after training, each row at its own best learning rate")
    for group, rates in sorted(runs.items()):
        model, split, tokens, row = json.loads(group)[:4]
        shared = set.intersection(*(set(seeds) for seeds in rates.values()))
        best = min(rates, key=lambda rate: mean(rates[rate][seed] for seed in shared or rates[rate]))
        found = list(rates[best].values())
        report.rows.append(
            {
                "model": model,
                "split": split,
                "tokens": tokens,
                "row": row,
                "perplexity": mean(found),
                "spread": stdev(found) if len(found) > 1 else None,
                "seeds": len(found),
                "learning_rate": best,
                "rates tried": len(rates),
            }
        )
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/, or demo")
    parser.add_argument("--json", type=Path, required=True, help="file of rows, read and appended to")
    parser.add_argument("--models", type=words, default=["wikilm"])
    parser.add_argument("--rows", type=words, default=["dense", "ast", "ast + slorb", "fixed mask", "no distillation"])
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--learning-rates", type=lambda text: [float(rate) for rate in text.split(",")], default=[1e-3])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--bf16", action="store_true", help="train in bf16 autocast")
    parser.add_argument(
        "--splits", type=words, default=["valid"], help="valid, test or both, where there is a test text"
    )
    parser.add_argument("--work", type=Path, default=Path("ast-output"), help="where runs put their files")
    parser.add_argument("--table", action="store_true", help="train nothing, print the table of the file")
    options = parser.parse_args()
    if wrong := [row for row in options.rows if row not in ("dense", *ROWS, *ONE_SHOT)]:
        parser.error(f"--rows: {', '.join(wrong)} unknown; there are dense, {', '.join([*ROWS, *ONE_SHOT])}")
    if wrong := [split for split in options.splits if split not in ("valid", "test")]:
        parser.error(f"--splits: {', '.join(wrong)} unknown; there are valid and test")
    if "test" in options.splits and len(options.learning_rates) > 1:
        parser.error("--splits test takes one learning rate: choose it on the validation split")
    rows = [json.loads(line) for line in options.json.read_text().splitlines()] if options.json.exists() else []
    for case in CASES if not options.table else ():
        has = [split for split in options.splits if split == "valid" or case.test]
        for seed in options.seeds if case.model in options.models else ():
            for row in options.rows:
                for rate in options.learning_rates:
                    asked = (case.model, row, options.steps, options.batch, options.bf16, arguments_of(row), seed, rate)
                    done = {found["split"] for found in rows if tuple(found.get(name) for name in KEY) == asked}
                    if left := [split for split in has if split not in done]:
                        rows += run(case, options.data, row, options, seed, rate, left)
    table(rows).print()


if __name__ == "__main__":
    main()
