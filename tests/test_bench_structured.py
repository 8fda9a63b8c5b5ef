"""The benchmarks of structured pruning: what they read, draw, count and print. No figure of theirs is checked here."""

import copy
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("scipy", reason="SciPy is not installed")
transformers = pytest.importorskip("transformers")

import sparsekit as sk  # noqa: E402
from sparsekit.benchmarking import Comparison, Timing  # noqa: E402
from sparsekit.methods import MagnitudeSP  # noqa: E402

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def module(name):
    return importlib.import_module(name)


def tiny_bert(**more):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 120, "num_hidden_layers": 2}
    return transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes, **more))


def tiny_llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 120}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=50, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    ).eval()


class Words:
    """A tokenizer that numbers words by their length, between 1 and 2."""

    def __call__(self, texts, truncation, max_length, padding=False, return_tensors=None):
        ids = [[1, *(3 + len(word) for word in text.split()), 2][:max_length] for text in texts]
        if not padding:
            return {"input_ids": ids}
        longest = max(map(len, ids))
        real = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in ids])
        return {"input_ids": torch.tensor([one + [0] * (longest - len(one)) for one in ids]), "attention_mask": real}


@pytest.fixture
def data(tmp_path):
    """The three tasks, made up."""
    for name, text in (
        ("sst2/train.tsv", "".join(f"text {'so ' * (n % 5)}number {n}\t{n % 2}\n" for n in range(40))),
        ("sst2/dev.tsv", "tabs\tin a text\t1\nplain\t0\n"),
        ("trec/train.txt", "".join(f"{'ABCDEF'[n % 6]}:x question {n} ?\n" for n in range(700))),
        ("stsb/stsb-en-train.csv", "".join(f'"one, two {n}",{"so " * (n % 3)}three {n},{n % 6}\n' for n in range(30))),
        ("stsb/stsb-en-dev.csv", "a b,a b,5.0\na b,c dd eee,0.5\n"),
    ):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="latin-1")
    return tmp_path


def test_tasks_are_read(data):
    tasks = {name: module("encoder_tasks").read_task(data, name) for name in ("sst2", "trec", "stsb")}
    assert tasks["sst2"].held_out == [(("tabs\tin a text",), 1), (("plain",), 0)]
    assert tasks["stsb"].train[1] == (("one, two 1", "so three 1"), 1.0)
    trec = tasks["trec"]
    assert (len(trec.train), len(trec.held_out)) == (100, 600)
    assert not set(trec.train) & set(trec.held_out)
    assert trec == module("encoder_tasks").read_task(data, "trec")
    assert {row.label for row in trec.held_out} == set(range(6))


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_a_seed_draws_the_same_texts_with_labels_and_without(data, name):
    bench = module("structured_quality")
    task = module("encoder_tasks").read_task(data, name)
    plain, labelled, other = (
        bench.draw_texts(task, Words(), 12, seed, labels) for seed, labels in ((0, False), (0, True), (1, False))
    )
    texts = plain.arguments["dataset"]
    assert (
        len(texts) == len(set(texts)) == 12 and set(texts) <= set(task.texts) and len(other.arguments["dataset"]) == 12
    )
    assert texts != other.arguments["dataset"] and plain.length == labelled.length
    assert plain.length == sum(len(text.split()) + 2 for text in texts) / 12
    rows = labelled.arguments["dataset"]
    if name == "sst2":
        assert [row["text"] for row in rows] == texts
        assert all((row["text"], row["label"]) in {(one.texts[0], one.label) for one in task.train} for row in rows)
    else:
        assert [batch["input_ids"].shape[0] for batch in rows] == [12] and rows[0]["labels"].shape == (6,)


def test_the_loss_of_pairs_is_that_of_their_cosines():
    tasks = module("encoder_tasks")
    encoder = tiny_bert().eval()
    batch = tasks.encoded(Words(), ["a bb", "a bb", "a bb", "cccc dd eee f"])
    with torch.no_grad():
        near = tasks.similarities(encoder, batch)
        hidden = encoder(input_ids=batch["input_ids"][2:3, :4]).last_hidden_state.mean(dim=1)
        other = encoder(input_ids=batch["input_ids"][3:4]).last_hidden_state.mean(dim=1)
        loss = tasks.Likeness(encoder)(**batch, labels=torch.tensor([5.0, 1.0])).loss
    assert near[0] == pytest.approx(1.0, abs=1e-5)
    assert near[1] == pytest.approx(float(torch.cosine_similarity(hidden, other)), abs=1e-5)
    assert loss == pytest.approx(float(((near - torch.tensor([1.0, 0.2])) ** 2).mean()))


def test_costs_are_what_torch_counts():
    bench = module("structured_quality")
    model = tiny_bert(attn_implementation="eager").eval()
    dense = bench.costs(model, 10)
    sk.apply_(model, sk.prune_(model, MagnitudeSP(sparsity=0.4), progress=False))
    found = bench.costs(model, 10)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encoder(torch.randn(1, 10, 24))
    assert found["flops"] == counter.get_total_flops() < dense["flops"]
    assert found["block_params"] == sum(p.numel() for p in model.encoder.layer.parameters()) < dense["block_params"]


def test_what_is_done_is_not_done_again(tmp_path):
    bench, judged = module("structured_quality"), []
    path = tmp_path / "rows.jsonl"

    def draw(seed, labelled):
        chunks = list(torch.randint(50, (4, 8), generator=torch.Generator().manual_seed(seed)))
        return bench.Draw({"dataset": chunks, "seed": seed}, 8)

    def judge(model):
        judged.append(model)
        return float(len(judged))

    subject = bench.Subject(tiny_llama(), "perplexity", judge, draw)
    command = f"--data . --json {path} --methods magnitude,flap --seeds 0,1 --budgets sparsity=20%"
    asked = {"case": "wikilm", "samples": 4, "split": "valid", "tokens": None}
    rows = []
    bench.measure_case(subject, asked, rows, bench.parsed(command.split()))
    # Magnitude draws nothing, so that one seed says all.
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("dense", None),
        ("magnitude", None),
        ("flap", 0),
        ("flap", 1),
    ]
    assert [row["loss"] for row in rows] == [0.0, 1.0, 2.0, 3.0] and {row["dense"] for row in rows[1:]} == {1.0}
    assert rows[1]["block_params_left"] == pytest.approx(0.8, abs=0.01)
    assert rows[2]["block_params_left"] == pytest.approx(0.8, abs=0.01)  # with its biases
    assert subject.model.model.layers[0].mlp.down_proj.in_features == 120
    again = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["score"] for row in again] == [row["score"] for row in rows]
    bench.measure_case(subject, asked, again, bench.parsed(command.split()))
    assert len(judged) == len(again) == 4
    for other in ({"samples": 5}, {"split": "test"}, {"tokens": 64}):
        assert bench.row_of(again, again[2]) is not None and bench.row_of(again, again[2] | other) is None


def quality_row(method, seed, score, **more):
    row = {"case": "sst2", "metric": "accuracy", "split": "dev", "samples": 8, "budget": "flops=60%", "dense": 0.9}
    row |= {"method": method, "seed": seed, "score": score, "loss": 0.9 - score}
    left = {"flops_left": 0.6, "block_params_left": 0.6, "params_left": 0.7}
    return row | left | {"seconds": 1.0, "cpu_seconds": 1.0} | more


def test_the_table_holds_means_and_spreads_the_best_first():
    rows = [quality_row("fisher", seed, score) for seed, score in enumerate((0.8, 0.84))]
    rows += [quality_row("contribution", 0, 0.89), quality_row("kcm", 0, 0.5, budget="flops=80%")]
    rows += [quality_row("dense", None, 0.9, budget=None)]
    report = module("structured_quality").table(rows)
    found = report.rows
    assert [row["method"] for row in found] == ["contribution", "fisher", "kcm"]
    assert found[0]["spread"] is None and found[0]["seeds"] == 1
    assert found[1]["accuracy"] == pytest.approx(0.82) and found[1]["spread"] == pytest.approx(0.04 / 2**0.5)
    assert found[1]["loss"] == pytest.approx(0.08) and found[1]["seeds"] == 2
    (note,) = report.notes
    assert note.startswith(
        "sst2, flops=60%: contribution loses 0.0100, fisher, best of the others, 0.0800: best or equal"
    )
    assert note.endswith("goal for loss, 0.02: met; goal for seconds, 60: met")
    slow = [quality_row("contribution", 0, 0.7, seconds=61.0), quality_row("kcm", 0, 0.8)]
    (note,) = module("structured_quality").table(slow).notes
    assert "0.1000: behind;" in note and note.endswith("loss, 0.02: missed, 0.2; goal for seconds, 60: missed, 61")


@pytest.mark.parametrize(
    "more, words",
    [
        ("--cases sst2,mnli", "mnli unknown; there are sst2, trec, stsb, stories260K"),
        ("--methods fischer", "fischer unknown"),
        ("--budgets flops=0%", "flops=0%"),
        ("--budgets weight=60%", "weight"),
    ],
)
def test_wrong_arguments_are_named(more, words, capsys):
    with pytest.raises(SystemExit):
        module("structured_quality").parsed(["--data", ".", "--json", "rows", *more.split()])
    assert words in capsys.readouterr().err


def test_every_row_is_a_method_that_takes_its_fields():
    bench = module("structured_quality")
    for row in bench.ROWS:
        assert bench.cells(row) == [row]
        assert bench.config_of(row, "flops=60%", 20.0).constraints == {"flops": "60%"}
    assert {*bench.OF_ENCODERS, *bench.OF_DECODERS} <= set(bench.ROWS)


@pytest.mark.parametrize("make", [tiny_bert, tiny_llama])
def test_a_fresh_twin_has_the_sizes_of_the_sliced_model(make):
    bench, dense, sliced = module("structured_latency"), make().eval(), make().eval()
    sk.apply_(sliced, sk.prune_(sliced, MagnitudeSP(sparsity=0.4, allocation="global"), progress=False))
    twin = bench.fresh_twin(sliced, dense)
    sizes = {name: parameter.shape for name, parameter in sliced.named_parameters()}
    assert {name: parameter.shape for name, parameter in twin.named_parameters()} == sizes
    assert sizes != {name: parameter.shape for name, parameter in dense.named_parameters()}
    theirs = {parameter.data_ptr() for parameter in sliced.parameters()}
    assert not theirs & {parameter.data_ptr() for parameter in twin.parameters()}


def test_the_ideal_counts_flops_and_the_weights_that_a_token_reads():
    bench, dense = module("structured_latency"), tiny_llama().eval()
    sliced = copy.deepcopy(dense)
    sk.apply_(sliced, sk.prune_(sliced, MagnitudeSP(sparsity=0.4), progress=False))
    models = {"dense": dense, "sliced": sliced}

    def read(model):
        table = model.get_input_embeddings().weight
        tied = model.get_output_embeddings().weight is table
        return sum(p.numel() for p in model.parameters()) - (0 if tied else table.numel())

    assert bench.ideal(models, 2, 8, True) == pytest.approx(read(dense) / read(sliced))
    macs = [sum(p.numel() for n, p in m.named_parameters() if "layers" in n and p.dim() == 2) for m in (dense, sliced)]
    head = dense.get_output_embeddings().weight.numel()
    found, at_most = bench.ideal(models, 2, 8, False), macs[0] / macs[1]
    assert (macs[0] + head) / (macs[1] + head) * 0.9 < found < at_most
    assert bench.ideal({"dense": dense, "sliced": dense}, 1, 8, False) == 1


def test_ratios_and_goals_of_latency():
    bench = module("structured_latency")
    timings = {"dense": (0.002, 0.003, 0.004), "sliced": (0.001, 0.002, 0.002), "fresh": (0.001, 0.001, 0.002)}
    found = bench.row_of(Comparison({side: Timing(seconds) for side, seconds in timings.items()}))
    assert found["speedup_median"] == pytest.approx(1.5) and found["speedup_min"] == pytest.approx(2.0)
    assert found["over_fresh_median"] == pytest.approx(2.0) and found["over_fresh_min"] == pytest.approx(1.0)
    assert found["dense_median_ms"] == pytest.approx(3.0) and found["noise"] == pytest.approx(2.0)
    more = {"case": "minilm", "phase": "forward", "batch": 1, "threads": 1, "round_to": 1, "flops_left": 0.6}
    report = bench.table([found | more])
    assert report.rows[0]["goals"] == "missed: 1.10 of fresh" and report.rows[0]["speed-up"] == pytest.approx(1.5)
    slow = found | more | {"speedup_median": 1.49, "over_fresh_median": 1.2}
    assert bench.table([slow]).rows[0]["goals"] == "missed: 1.5x dense and 1.10 of fresh"
    assert bench.table([slow | {"speedup_median": 1.5, "over_fresh_median": 1.1}]).rows[0]["goals"] == "met"
    assert report.notes == ["minilm, forward, batch 1: other work ran on the machine; run again when it is quiet"]


def test_latency_takes_methods_that_slice_without_labels(capsys):
    for method in ("fisher", "depth", "slicegpt"):
        with pytest.raises(SystemExit):
            module("structured_latency").parsed(["--data", ".", "--method", method])
        assert "invalid choice" in capsys.readouterr().err
