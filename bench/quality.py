"""Perplexity after one-shot pruning, by method, on small models that are trained to the end.

    python bench/quality.py --data DIR [--models wikilm,…] [--methods sparsegpt,…] [--pattern 2:4] [--seeds 0,1,2]

DIR holds `models/` (stories260K, babyllama_tok105, wikilm) and `data/` (tinystories, wikitext2); what is missing is
skipped, and said so. `--data demo` takes wikilm and the text that lie in the checkout. Calibration: 128 random
chunks of the training split, as long as the test chunks. Prints a table, then one JSON line for each row. `--split
test` reads the test text where there is one, for final numbers.

    python bench/quality.py --data DIR --methods sparsegpt --formats semi24_int4,semi24_int8 --split test

adds, for each quantised format, rounding after pruning (to nearest; and by a second pass that keeps the zeros and makes
up for the rounding, as GPTQ does) and pruning and rounding in one pass; all in the same order of columns.

    git clone https://github.com/IST-DASLab/sparsegpt CLONE && git -C CLONE checkout 147d215
    python bench/quality.py --data DIR --methods sparsegpt --published CLONE

adds a row by the published SparseGPT class, on the same chunks; 2:4 only.

A method is one of those that `sparsekit.METHODS` names; "ria+permute" puts inputs into a better order first, and
"sparsegpt+reconstruct" refits the kept weights afterwards, block by block, on 512 chunks.
"""

import argparse
import importlib
import io
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import sparsekit as sk
from sparsekit.evaluate import perplexity, read_tokens
from sparsekit.methods import METHODS
from sparsekit.report import Report

NUM_SAMPLES = 128
NUM_REFIT_SAMPLES = 512


@dataclass(frozen=True)
class Case:
    """A model, and where its text is."""

    model: str
    train: str
    valid: str
    chunk: int
    test: str | None = None

    def held_out(self, split: str) -> str:
        """Return the text of the perplexity."""
        return self.test if split == "test" and self.test else self.valid


def model_in(root: Path, case: Case) -> Path:
    """Return where a case's model lies in a folder with models/, or in the checkout's demo/."""
    return root / "models" / case.model if (root / "models").is_dir() else root / case.model


def text_in(root: Path, file: str) -> Path:
    """Return where a case's text lies in a folder with data/, or in the checkout's demo/."""
    return root / "data" / file if (root / "data").is_dir() else root / "text" / Path(file).name


CASES = (
    Case("stories260K", "tinystories/tok512/train.bin", "tinystories/tok512/valid.bin", 512),
    Case("babyllama_tok105", "tinystories/tok105/train.bin", "tinystories/tok105/valid.bin", 256),
    Case("wikilm", "wikitext2/train.txt", "wikitext2/valid.txt", 256, "wikitext2/test.txt"),
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


def prune_published_(model: Any, chunks: list[Tensor], clone: Path) -> None:
    """Prune to 2:4 with the class `SparseGPT` of a clone of IST-DASLab/sparsegpt, in the procedure of its llama.py.

    Block by block: all linear layers of a block gather their Hessians on the outputs of the pruned blocks before it,
    one chunk at a time; then each is pruned with the settings that llama.py starts with (1 % damping, blocks of 128
    columns). The inputs of a block come from forwards of the whole model, which llama.py spares by keeping them.
    """
    import transformers
    from transformers.pytorch_utils import Conv1D

    transformers.Conv1D = Conv1D  # where the class looks for it
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None  # it waits for the device whichever device it runs on
    if str(clone) not in sys.path:
        sys.path.insert(0, str(clone))
    published = importlib.import_module("sparsegpt").SparseGPT
    for block in model.model.layers:
        workers = {layer: published(layer) for layer in block.modules() if isinstance(layer, nn.Linear)}
        handles = [
            layer.register_forward_hook(lambda _, args, out, worker=worker: worker.add_batch(args[0].data, out.data))
            for layer, worker in workers.items()
        ]
        with torch.no_grad():
            for chunk in chunks:
                model(input_ids=chunk[None], use_cache=False)
            for handle in handles:
                handle.remove()
            for worker in workers.values():
                with redirect_stdout(io.StringIO()):
                    worker.fasterprune(0.5, prunen=2, prunem=4, percdamp=0.01, blocksize=128)


def config_of(method: str, pattern: str) -> Any:
    """Return the config of a method's name, with or without "+permute" and "+reconstruct" behind it."""
    name, *options = method.split("+")
    if wrong := set(options) - {"permute", "reconstruct"}:
        raise ValueError(f"--methods {method}: +{wrong.pop()} unknown; there are +permute and +reconstruct")
    return METHODS.get(name)(pattern=pattern, permute="permute" in options)


def round_to_nearest_(model: Any, format: str) -> None:
    """Leave in each pruned layer what its packed form would run with."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who would run it does not matter here
        sk.unpack_(sk.pack_(model, format, "reference"))


def measure(
    case: Case,
    root: Path,
    methods: list[str],
    pattern: str,
    seeds: list[int],
    formats: list[str],
    split: str = "valid",
    published: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield a row for the dense model, then one for each method, format and seed, and for the published SparseGPT."""
    model_dir, held_out = model_in(root, case), case.held_out(split)
    model = load_model(model_dir)
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, valid = (load_ids(text_in(root, file), model_dir) for file in (case.train, held_out))

    def row(method: str, seed: int | None, seconds: float | None) -> dict[str, Any]:
        found = perplexity(model, valid, max_seq_length=case.chunk, progress=False)
        return {
            "model": case.model,
            "method": method,
            "pattern": "dense" if method == "dense" else pattern,
            "seed": seed,
            "text": text_in(root, held_out).relative_to(root).as_posix().removeprefix("data/"),
            "perplexity": found.value,
            "seconds": seconds,
            "torch": torch.__version__,
        }

    yield row("dense", None, None)
    for method in methods:
        config = config_of(method, pattern)
        needs_data = config.statistics is not None
        for seed in seeds if needs_data else seeds[:1]:
            model.load_state_dict(dense)
            started = time.perf_counter()
            chunks = random_chunks(train, case.chunk, seed)
            plan = sk.prune_(model, config, dataset=chunks, seed=seed, progress=False)
            if "+reconstruct" in method:
                more = random_chunks(train, case.chunk, seed, NUM_REFIT_SAMPLES)
                sk.reconstruct_(model, plan, dense=dense, dataset=more, seed=seed, progress=False)
            yield row(method, seed, time.perf_counter() - started)
    for seed in seeds if formats else []:
        chunks = random_chunks(train, case.chunk, seed)

        def prune_(started_from: dict[str, Tensor], format: str | None, seed: int = seed, data: Any = chunks) -> float:
            model.load_state_dict(started_from)
            config = sk.SparseGPT(pattern=pattern, format=format, strongest_first=True)
            started = time.perf_counter()
            sk.prune_(model, config, dataset=data, seed=seed, progress=False)
            return time.perf_counter() - started

        yield row("sparsegpt, strongest first", seed, prune_(dense, None))
        pruned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        for format in formats:
            model.load_state_dict(pruned)
            round_to_nearest_(model, format)
            yield row(f"… then {format} to nearest", seed, None)
            yield row(f"… then {format} in a second pass", seed, prune_(pruned, format))
            yield row(f"{format} in one pass", seed, prune_(dense, format))
    for seed in seeds if published is not None else []:
        model.load_state_dict(dense)
        started = time.perf_counter()
        prune_published_(model, random_chunks(train, case.chunk, seed), published)
        yield row("published sparsegpt", seed, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names: Callable[[str], list[str]] = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/, or demo")
    parser.add_argument("--models", type=names, default=[case.model for case in CASES])
    parser.add_argument("--methods", type=names, default=["magnitude", "wanda", "sparsegpt"])
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0])
    parser.add_argument("--formats", type=names, default=[], help="quantised formats; 2:4 only")
    parser.add_argument("--split", choices=["valid", "test"], default="valid", help="text of the perplexity")
    parser.add_argument("--published", type=Path, help="clone of IST-DASLab/sparsegpt, to compare with; 2:4 only")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    if options.published is not None and options.pattern != "2:4":
        parser.error("--published compares 2:4 only")
    report = Report(f"Perplexity after one-shot pruning to {options.pattern}")
    for case in CASES:
        if case.model not in options.models:
            continue
        texts = [text_in(options.data, file) for file in (case.train, case.held_out(options.split))]
        needed = [model_in(options.data, case), *texts]
        if missing := [str(path) for path in needed if not path.exists()]:
            report.notes.append(f"{case.model} skipped: no {', '.join(missing)}")
            continue
        for row in measure(
            case,
            options.data,
            options.methods,
            options.pattern,
            options.seeds,
            options.formats,
            options.split,
            options.published,
        ):
            print(f"{row['model']}, {row['method']}: {row['perplexity']:.4f}", file=sys.stderr, flush=True)
            report.rows.append(row)
    report.print()
    lines = [json.dumps(row) for row in report.rows]
    print("\n".join(lines))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
