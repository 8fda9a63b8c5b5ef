"""Perplexity after one-shot pruning, by method, on small models that are trained to the end.

    python bench/quality.py --data DIR [--models wikilm,…] [--methods sparsegpt,…] [--pattern 2:4] [--seeds 0,1,2]

DIR holds `models/` (stories260K, babyllama_tok105, wikilm) and `data/` (tinystories, wikitext2); what is missing is
skipped, and said so. Calibration: 128 random chunks of the training split, as long as the test chunks. Prints a
table, then one JSON line for each row.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sparsekit as sk
from sparsekit.evaluate import perplexity, read_tokens
from sparsekit.methods import METHODS
from sparsekit.report import Report

NUM_SAMPLES = 128


@dataclass(frozen=True)
class Case:
    """A model, and where its text is."""

    model: str
    train: str
    valid: str
    chunk: int


CASES = (
    Case("stories260K", "tinystories/tok512/train.bin", "tinystories/tok512/valid.bin", 512),
    Case("babyllama_tok105", "tinystories/tok105/train.bin", "tinystories/tok105/valid.bin", 256),
    Case("wikilm", "wikitext2/train.txt", "wikitext2/valid.txt", 256),
)


def load_model(folder: Path) -> Any:
    """Return the model in fp32: the CPU's half precision would blur what is measured."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_ids(path: Path, model_dir: Path) -> Tensor:
    """Return a split as one stream of token ids: uint16 numbers, or text for the model's tokenizer."""
    if path.suffix == ".bin":
        return torch.from_numpy(np.fromfile(path, dtype=np.uint16).astype(np.int64))
    from transformers import AutoTokenizer

    return read_tokens(path, AutoTokenizer.from_pretrained(model_dir))


def random_chunks(ids: Tensor, length: int, seed: int, num: int = NUM_SAMPLES) -> list[Tensor]:
    """Return `num` chunks of the stream from random places; they may overlap."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, ids.numel() - length, (num,), generator=generator)
    return [ids[start : start + length] for start in starts.tolist()]


def measure(case: Case, root: Path, methods: list[str], pattern: str, seeds: list[int]) -> Iterator[dict[str, Any]]:
    """Yield a row for the dense model, then one for each method and seed."""
    model_dir = root / "models" / case.model
    model = load_model(model_dir)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, valid = (load_ids(root / "data" / split, model_dir) for split in (case.train, case.valid))

    def row(method: str, seed: int | None, seconds: float | None) -> dict[str, Any]:
        found = perplexity(model, valid, max_seq_length=case.chunk, progress=False)
        return {
            "model": case.model,
            "method": method,
            "pattern": "dense" if method == "dense" else pattern,
            "seed": seed,
            "perplexity": found.value,
            "seconds": seconds,
            "torch": torch.__version__,
        }

    yield row("dense", None, None)
    for method in methods:
        needs_data = METHODS.get(method).statistics is not None
        for seed in seeds if needs_data else seeds[:1]:
            model.load_state_dict(dense)
            started = time.perf_counter()
            chunks = random_chunks(train, case.chunk, seed)
            sk.prune_(model, METHODS.get(method)(pattern=pattern), dataset=chunks, seed=seed, progress=False)
            yield row(method, seed, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: Callable[[str], list[str]] = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/")
    parser.add_argument("--models", type=names, default=[case.model for case in CASES])
    parser.add_argument("--methods", type=names, default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    report = Report(f"Perplexity after one-shot pruning to {options.pattern}")
    for case in CASES:
        if case.model not in options.models:
            continue
        needed = [options.data / "models" / case.model, options.data / "data" / case.train]
        if missing := [str(path) for path in needed if not path.exists()]:
            report.notes.append(f"{case.model} skipped: no {', '.join(missing)}")
            continue
        report.rows += measure(case, options.data, options.methods, options.pattern, options.seeds)
    report.print()
    lines = [json.dumps(row) for row in report.rows]
    print("\n".join(lines))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
