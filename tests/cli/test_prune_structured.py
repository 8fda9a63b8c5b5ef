"""Taking heads, channels and blocks out, on the command line: what is said, what is saved, and what is refused."""

import csv
import json
import struct
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.cli import app
from sparsekit.cli.calibration_file import CalibrationFile
from sparsekit.cli.sensitivity_plot import WidthLine, draw_blocks, draw_widths
from sparsekit.cli.sizes import Sizes
from sparsekit.hf import QUANT_METHOD
from sparsekit.nn import sparse_layers
from sparsekit.plan import Plan
from sparsekit.report import Report

WORDS = "the a film is good bad dull bright long short and very not so plain fine".split()
LABELS = ["bad", "good"]
QUIET = ["--no-bench", "--no-plot", "-q"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def prune(*words, json_path):
    """Run `sparsekit prune`, and return what it wrote to --json."""
    result = run("prune", *words, "--json", json_path)
    assert result.exit_code == 0, result.stderr
    return json.loads(json_path.read_text()) | {"stdout": " ".join(result.stdout.split()), "stderr": result.stderr}


def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    made = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    made.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def bert(kind, folder, **more):
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        **more,
    )
    getattr(transformers, kind)(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {name: index for index, name in enumerate(LABELS)}}
    return bert("BertForSequenceClassification", tmp_path_factory.mktemp("models") / "classifier", **names)


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    folder = bert("BertModel", tmp_path_factory.mktemp("models") / "embedder")
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Labelled rows, text<tab>label, without names."""
    generator = torch.Generator().manual_seed(0)
    path = tmp_path_factory.mktemp("text") / "reviews.tsv"
    lines = []
    for index in range(24):
        picked = torch.randint(len(WORDS), (3 + index % 5,), generator=generator).tolist()
        lines.append(" ".join(WORDS[place] for place in picked) + "\t" + LABELS[index % 2])
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def calibration(text):
    return ["--dataset", text, "--num-calibration-samples", 8, "--max-seq-length", 16]


def sizes_of(folder):
    return Sizes.of(sk.load(folder), 16)


def is_png(path):
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    return content[:8] == b"\x89PNG\r\n\x1a\n" and min(width, height) > 300


def test_the_default_says_all_and_saves_a_model_that_loads(tiny_model, text, calibration, tmp_path):
    out = tmp_path / "out"
    words = ["--pattern", "structured", "--flops", "60%", "--eval-dataset", text, "--bench-batches", "1,2"]
    found = prune(tiny_model, out, *words, *calibration, "-q", json_path=tmp_path / "r.json")
    assert found["ok"] and set(found) >= {"quality", "layers", "check", "saved", "benchmark", "environment"}
    flops = found["layers"]["numbers"]["FLOPs of the blocks"]
    assert 0.597 <= flops["after"] / flops["before"] <= 0.6
    blocks = sizes_of(out).blocks
    for row in found["layers"]["rows"]:
        saved = blocks[row["block"]]
        assert {key: row[f"{key} left"] for key in saved} == saved, "the table is not of what was saved"
        assert row["heads"] == 4 and row["KV heads"] == 2 and row["channels"] == 64
    assert [row["model"] for row in found["quality"]["rows"]] == ["dense", "pruned"]
    assert {(row["what"], row["batch"]) for row in found["benchmark"]["rows"]} == {
        (what, batch) for what in ("prefill", "decode") for batch in (1, 2)
    }
    assert found["benchmark"]["summary"]["verdict"] in found["stdout"]
    assert "import sparsekit" in found["saved"]["summary"]["who can open it"]
    assert is_png(out / "sensitivity.png") and (out / "tokenizer.json").is_file()
    plan = Plan.load(out / "plan.safetensors")
    widths = {width.name: width for width in find_widths(sk.load(out))}
    assert plan.cuts and all(widths[name].num_units == len(cut.kept) for name, cut in plan.cuts.items())
    assert plan.sensitivity.keys() == widths.keys()


@pytest.mark.parametrize(
    "method, words, kept_whole",
    [
        ("kcm", ["--params", "75%"], "heads"),
        ("flap", ["--sparsity", 0.4985], None),
        ("wanda-sp", ["--sparsity", 0.5], None),
        ("magnitude-sp", ["--sparsity", 0.5, "--set", "allocation=global"], None),
        ("contribution", ["--sparsity", 0.5, "--set", "selection=score"], None),
        ("fisher", ["--sparsity", 0.5], None),
    ],
)
def test_each_method_narrows(method, words, kept_whole, tiny_model, calibration, tmp_path):
    words = ["--method", method, *words, *calibration, "--plot", "--no-bench", "-q"]
    found = prune(tiny_model, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    share = found["layers"]["numbers"]["parameters of the blocks"]
    norms = 2 * 2 * 32
    wanted = 0.75 if method == "kcm" else 0.5
    assert (share["after"] - norms) / (share["before"] - norms) == pytest.approx(wanted, abs=0.02)
    if kept_whole:
        assert all(row[kept_whole] == row[f"{kept_whole} left"] for row in found["layers"]["rows"])
    assert is_png(tmp_path / "out" / "sensitivity.png")
    assert sizes_of(tmp_path / "out").total("parameters") == share["after"]
    assert Plan.load(tmp_path / "out" / "plan.safetensors").made_by.method == method.replace("-", "_")


def test_depth_takes_blocks_out_and_draws_them(tiny_model, calibration, tmp_path):
    words = ["--method", "depth", "--params", "50%", *calibration, "--plot", "--no-bench", "-q"]
    found = prune(tiny_model, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert sorted(row["heads left"] for row in found["layers"]["rows"]) == [0, 4]
    assert len(sk.load(tmp_path / "out").model.layers) == 1 and is_png(tmp_path / "out" / "sensitivity.png")
    assert "sparsekit" not in found["saved"]["summary"]["who can open it"].split("without")[0]


def test_slicegpt_has_fewer_hidden_dimensions_and_no_plot(tiny_model, calibration, tmp_path):
    words = ["--method", "slicegpt", "--sparsity", 0.25, "--round-to", 4, *calibration, "--plot", "--no-bench", "-q"]
    found = prune(tiny_model, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert found["layers"]["numbers"]["hidden dimensions"] == {"before": 32, "after": 24}
    assert "takes the same from every layer" in found["stdout"] and not (tmp_path / "out" / "sensitivity.png").exists()


def test_uniform_and_rounded_widths_need_no_sparsekit(tiny_model, calibration, tmp_path):
    words = ["--method", "wanda-sp", "--sparsity", 0.5, "--uniform", "--round-to", 16, *calibration, *QUIET]
    result = run("prune", tiny_model, tmp_path / "out", "--pattern", "structured", *words)
    assert result.exit_code == 0, result.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["intermediate_size"] % 16 == 0 and (config["intermediate_size"], config["num_attention_heads"]) < (
        64,
        4,
    )
    ids = torch.arange(10)[None]
    stock, ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), sk.load(tmp_path / "out")
    assert torch.equal(stock(ids).logits, ours(ids).logits)


def test_widths_first_and_then_2_4(tiny_model, calibration, tmp_path):
    words = ["--pattern", "structured,2:4", "--method", "wanda-sp,wanda", "--sparsity", 0.5, *calibration, *QUIET]
    found = prune(tiny_model, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    model = sk.load(tmp_path / "out")
    packed = sparse_layers(model)
    assert len(packed) == 14 and found["check"]["summary"]["packed"] == 14
    left = {row["block"]: row["channels left"] for row in found["layers"]["rows"]}
    for block, channels in left.items():
        assert packed[f"{block}.mlp.up_proj"].out_features == channels < 64
    assert model.config.quantization_config.quant_method == QUANT_METHOD


def test_a_classifier_with_labels(classifier, reviews, tmp_path):
    words = ["--method", "fisher", "--flops", "70%", "--dataset", reviews, "--eval-dataset", reviews, *QUIET]
    found = prune(classifier, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert [row["samples"] for row in found["quality"]["rows"]] == [24, 24]
    assert all(0 <= row["accuracy"] <= 1 for row in found["quality"]["rows"])
    again = run("eval", tmp_path / "out", "--dataset", reviews, "--json", "-", "-q")
    assert again.exit_code == 0, again.stderr
    assert json.loads(again.stdout)["evaluation"]["summary"]["accuracy"] == found["quality"]["rows"][1]["accuracy"]
    assert (
        type(sk.load(tmp_path / "out"))
        is AutoModelForSequenceClassification._model_mapping[type(sk.load(classifier).config)]
    )


def test_accuracy_is_the_share_that_is_right(classifier, reviews):
    from transformers import AutoTokenizer

    model, tokens = sk.load(classifier), AutoTokenizer.from_pretrained(classifier)
    right = 0
    for line in reviews.read_text().splitlines():
        words, label = line.split("\t")
        right += LABELS[model(**tokens(words, return_tensors="pt")).logits.argmax().item()] == label
    result = run("eval", classifier, "--dataset", reviews, "--json", "-", "-q")
    assert json.loads(result.stdout)["evaluation"]["summary"]["accuracy"] == pytest.approx(right / 24)


def test_a_sentence_encoder_keeps_what_others_open_it_with(embedder, reviews, tmp_path):
    words = ["--pattern", "structured", "--sparsity", 0.5, "--dataset", reviews, *QUIET]
    found = prune(embedder, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file() and (tmp_path / "out" / "modules.json").is_file()
    share = found["layers"]["numbers"]["parameters of the blocks"]
    assert share["after"] < 0.6 * share["before"]
    refused = run("prune", embedder, tmp_path / "o", *words[:-1], "--eval-dataset", reviews)
    assert refused.exit_code == 2 and "nothing to judge it by" in refused.stderr and not (tmp_path / "o").exists()


@pytest.mark.parametrize("method", ["contribution", "fisher"])
def test_images_in_folders_of_their_classes(method, tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow reads the images")
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
        id2label=dict(enumerate(LABELS)),
        label2id={name: index for index, name in enumerate(LABELS)},
    )
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    for index in range(8):
        (tmp_path / "images" / LABELS[index % 2]).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (20, 20, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        image.fromarray(pixels.numpy()).save(tmp_path / "images" / LABELS[index % 2] / f"{index}.png")
    words = [
        "--method",
        method,
        "--sparsity",
        0.5,
        "--dataset",
        tmp_path / "images",
        "--eval-dataset",
        tmp_path / "images",
    ]
    words += ["--bench-batches", 1, "--batch-size", 2, "--no-plot", "-q"]
    found = prune(tmp_path / "vit", tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert found["quality"]["rows"][0]["samples"] == 8
    assert [row["what"] for row in found["benchmark"]["rows"]] == ["forward"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    assert sizes_of(tmp_path / "out").total("channels") < 128


def test_without_data_it_warns_and_draws_what_is_kept(tiny_model, tmp_path):
    words = ["--pattern", "structured", "--sparsity", 0.5, "--no-bench", "--plot", "-q"]
    found = prune(tiny_model, tmp_path / "out", *words, json_path=tmp_path / "r.json")
    assert "by magnitude, which costs far more quality" in found["stderr"]
    assert is_png(tmp_path / "out" / "sensitivity.png")
    assert Plan.load(tmp_path / "out" / "plan.safetensors").made_by.method == "magnitude_sp"


@pytest.mark.parametrize("method", ["contribution", "kcm", "magnitude-sp", "depth", "slicegpt"])
def test_bars_reach_their_ends(method, tiny_model, calibration, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total):
            self.total, self.done = total, 0

        def advance(self, steps=1, text=None):
            self.done += steps

        def expect(self, total):
            self.total = total

    @contextmanager
    def recorded(description, total, enabled=True):
        bars.append(Bar(total))
        yield bars[-1]

    monkeypatch.setattr("sparsekit.prune_structured.progress_bar", recorded)
    words = ["--method", method, "--params", "75%" if method == "kcm" else "50%", *calibration, *QUIET]
    result = run("prune", tiny_model, tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    assert [(bar.done, bar.total) for bar in bars] == [(bars[0].total, bars[0].total)] and bars[0].total > 0


@pytest.fixture
def sliced(tiny_model, tmp_path):
    result = run("prune", tiny_model, tmp_path / "sliced", "--method", "magnitude-sp", "--sparsity", 0.5, *QUIET)
    assert result.exit_code == 0, result.stderr
    return tmp_path / "sliced"


def test_the_other_commands_take_the_result(sliced, tiny_model, text):
    sizes = ["--prompt-length", 8, "--new-tokens", 2, "--rounds", 1, "-q"]
    for words in (
        ["eval", sliced, "--dataset", text, "--max-seq-length", 32, "-q"],
        ["bench", sliced, *sizes],
        ["doctor", sliced, "--num-tokens", 1, "--max-seconds", 1, "-q"],
    ):
        result = run(*words)
        assert result.exit_code == 0, result.stderr
    result = run("bench", sliced, "--against", tiny_model, *sizes, "--json", "-")
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)["benchmark"]["rows"]
    assert [row["what"] for row in rows] == ["prefill", "decode"] and all(row["smaller ms"] > 0 for row in rows)


def test_against_another_model_is_refused(sliced, classifier):
    result = run("bench", sliced, "--against", classifier, "-q")
    assert result.exit_code == 2 and "name the model that it was made from" in result.stderr


def test_a_budget_in_time_is_held_against_the_measurement(tiny_model, tmp_path, monkeypatch):
    from sparsekit.benchmarking import LatencyTable

    asked = []

    def table(model, legal, *, batch_size, length):
        asked.append((batch_size, length))
        points = {w.name: ((0, 0.0), (w.num_units, float(w.num_units * w.columns))) for w in legal.widths}
        return LatencyTable(batch_size, length, points, {w.name: w.num_units for w in legal.widths}, 0.0)

    replaced = [
        name for name, module in sys.modules.items() if name.startswith("sparsekit.") and "benchmarking" not in name
    ]
    for name in replaced:
        if hasattr(sys.modules[name], "measure_latency"):
            monkeypatch.setattr(sys.modules[name], "measure_latency", table)
    words = ["--method", "magnitude-sp", "--speedup", 2, "--batch", 3, "--length", 9, "--bench-batches", 1, "-q"]
    found = prune(tiny_model, tmp_path / "out", *words, "--no-plot", json_path=tmp_path / "r.json")
    assert asked == [(3, 9)]
    assert {row["batch"] for row in found["benchmark"]["rows"]} == {1, 3}
    assert any("--speedup 2.0 was asked for at batch 3" in note for note in found["benchmark"]["notes"])


BAD = {
    "no budget": (["--pattern", "structured"], "how much shall go?"),
    "two budgets": (
        ["--pattern", "structured", "--flops", "60%", "--sparsity", "0.5"],
        "--sparsity 0.5 and --flops 60%",
    ),
    "budget": (["--method", "kcm", "--flops", "many"], "flops='many' is no budget"),
    "budget range": (["--method", "kcm", "--flops", "140%"], "is no budget"),
    "speedup": (["--method", "magnitude-sp", "--speedup", "0.5"], "speedup=0.5 is no budget"),
    "out of reach": (["--method", "magnitude-sp", "--params", "1e9"], "nothing cut"),
    "nearest": (["--method", "kcm", "--params", "5%", "--dataset", "{text}", "--max-seq-length", "8"], "can be had"),
    "batch": (["--method", "magnitude-sp", "--flops", "60%", "--batch", "4"], "--batch 4: for budgets in time"),
    "shape": (["--method", "depth", "--sparsity", "0.5", "--uniform", "--dataset", "{text}"], "--uniform: for methods"),
    "zeros take none": (["--flops", "60%"], "--flops 60%: not for a pattern of zeros"),
    "zeros take no labels": (["--pattern", "4:8", "--labels", "2"], "--labels 2: not for"),
    "permute": (["--pattern", "structured", "--permute", "--flops", "60%"], "--permute True: not for"),
    "format": (["--pattern", "structured", "--format", "semi24", "--flops", "60%"], "--format semi24: not for"),
    "method of zeros": (["--pattern", "structured", "--method", "wanda", "--flops", "60%"], "zeroes weights"),
    "method": (["--pattern", "structured", "--method", "kcmm", "--flops", "60%"], "Did you mean 'kcm'?"),
    "order": (["--pattern", "2:4,structured", "--flops", "60%"], "then maybe one pattern of zeros"),
    "twice": (["--pattern", "structured,depth", "--flops", "60%"], "structured,2:4"),
    "methods": (["--pattern", "structured", "--method", "kcm,wanda", "--flops", "60%"], "one for each pattern"),
    "second": (
        ["--pattern", "structured,2:4", "--method", "magnitude-sp,wanda", "--flops", "60%"],
        "needs calibration",
    ),
    "data": (["--method", "kcm", "--flops", "60%"], "kcm needs calibration data (unlabelled text)"),
    "labelled data": (["--method", "fisher", "--flops", "60%"], "(labelled rows"),
    "dataset": (["--method", "kcm", "--flops", "60%", "--dataset", "none.tsv"], "none.tsv: there is no such file"),
    "folder": (["--method", "kcm", "--flops", "60%", "--dataset", "{empty}"], "is a folder without images"),
    "suffix": (["--method", "kcm", "--flops", "60%", "--dataset", "{model}/config.yaml"], "no such file"),
    "set": (["--method", "kcm", "--flops", "60%", "--dataset", "{text}", "--set", "sigmaa=2"], "Did you mean 'sigma'?"),
    "set twice": (["--method", "kcm", "--flops", "60%", "--set", "sparsity=0.2"], "--set sparsity"),
    "batches": (["--method", "magnitude-sp", "--flops", "60%", "--bench-batches", "one"], "--bench-batches 'one'"),
    "out is model": (["--method", "magnitude-sp", "--flops", "60%", "--out-is-model"], "OUT is MODEL"),
    "samples": (
        ["--method", "flap", "--flops", "60%", "--dataset", "{text}", "--num-calibration-samples", "0"],
        "at least 1",
    ),
    "batch size": (["--method", "flap", "--flops", "60%", "--dataset", "{text}", "--batch-size", "0"], "at least 1"),
    "length": (["--method", "flap", "--flops", "60%", "--dataset", "{text}", "--length", "0"], "length=0"),
    "columns of .txt": (
        ["--method", "kcm", "--flops", "60%", "--dataset", "{text}", "--labels", "x"],
        "has no columns",
    ),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_arguments(words, message, tiny_model, text, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"model": str(tiny_model), "text": str(text), "empty": str(tmp_path / "empty")}
    out = tiny_model if "--out-is-model" in words else tmp_path / "out"
    given = [word.format(**places) for word in words if word != "--out-is-model"]
    before = sorted(tiny_model.iterdir())
    result = run("prune", tiny_model, out, *given, "-q")
    assert result.exit_code == 2, result.output
    complaints = [line for line in result.stderr.splitlines() if "warning" not in line]
    assert len(complaints) == 1 and message in complaints[0], result.stderr
    assert not (tmp_path / "out").exists() and sorted(tiny_model.iterdir()) == before


def test_labels_that_the_model_does_not_know(classifier, tmp_path):
    (tmp_path / "r.tsv").write_text("a film\tgood\nso dull\tgodo\n")
    words = ["--method", "fisher", "--flops", "70%", "--dataset", tmp_path / "r.tsv", *QUIET]
    result = run("prune", classifier, tmp_path / "out", *words)
    assert result.exit_code == 2 and "unknown label 'godo'" in result.stderr and not (tmp_path / "out").exists()


def test_a_text_holds_no_labels(classifier, text, tmp_path):
    words = ["--method", "fisher", "--flops", "70%", "--dataset", text, *QUIET]
    result = run("prune", classifier, tmp_path / "out", *words)
    assert result.exit_code == 2 and "a .txt holds no labels" in result.stderr


def test_a_folder_that_cannot_be_written_is_told_before_the_work(tiny_model, text, monkeypatch, tmp_path):
    monkeypatch.setattr("sparsekit.cli.structured.load_model", lambda *_: pytest.fail("the work was begun"))
    result = run("prune", tiny_model, text / "out", "--method", "magnitude-sp", "--flops", "60%", "-q")
    assert result.exit_code == 2 and "OUT" in result.stderr


def test_what_does_not_hold_is_not_saved(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(sk, "check", lambda *_: Report("check", notes=["one layer is broken"], ok=False))
    result = run("prune", tiny_model, tmp_path / "out", "--method", "magnitude-sp", "--sparsity", 0.5, *QUIET)
    assert result.exit_code == 1 and "nothing was saved" in result.stderr and "one layer is broken" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("part", ["apply_", "check", "save"])
def test_what_fails_leaves_nothing(part, tiny_model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(sk, part, broken)
    result = run("prune", tiny_model, tmp_path / "out", "--method", "magnitude-sp", "--sparsity", 0.5, *QUIET)
    assert result.exit_code == 1 and "broken" in result.stderr and list(tmp_path.iterdir()) == []


def test_timing_that_fails_says_where_the_model_is(tiny_model, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr("sparsekit.cli.structured.against_dense", broken)
    words = ["--method", "magnitude-sp", "--sparsity", 0.5, "--no-plot", "-q"]
    result = run("prune", tiny_model, tmp_path / "out", *words)
    assert result.exit_code == 1 and f"the pruned model is in {tmp_path / 'out'}" in result.stderr
    assert sk.load(tmp_path / "out") is not None


CONFIG = SimpleNamespace(num_labels=2, label2id={"bad": 0, "good": 1})


@pytest.mark.parametrize(
    "name, content, columns, wanted",
    [
        ("plain.tsv", 'a "film\tgood\nso dull\t0\n', (None, None), [('a "film', 1), ("so dull", 0)]),
        ("named.tsv", "idx\tlabel\tsentence\n7\t1\ta film\n", (None, None), [("a film", 1)]),
        ("asked.csv", 'note,what\n"a film, long",good\n', ("note", "what"), [("a film, long", 1)]),
        ("places.csv", "x,0,*,a film\n", ("4", "2"), [("a film", 0)]),
        ("rows.jsonl", '{"content": "a film", "label": 1}\n\n{"content": "b", "label": 0}\n', (None, None), None),
    ],
)
def test_files_are_read_by_their_columns(name, content, columns, wanted, tmp_path):
    (tmp_path / name).write_text(content)
    file = CalibrationFile(str(tmp_path / name), "--dataset", *columns)
    file.check()
    rows = file.texts(CONFIG, needs_labels=True)
    assert [(row["text"], row["label"]) for row in rows] == (wanted or [("a film", 1), ("b", 0)])
    assert file.texts(CONFIG, needs_labels=False) == [{"text": row["text"]} for row in rows]


@pytest.mark.parametrize(
    "name, content, columns, message",
    [
        ("x.csv", "text,label\na,1\n", ("note", None), "no column 'note'"),
        ("x.jsonl", '{"body": "a"}\n', (None, None), "no column of text: it has 'body'"),
        ("x.jsonl", '{"text": "a"}\n', (None, None), "no column of labels"),
        ("x.jsonl", '{"text": "a"\n', (None, None), "line 1 is no JSON"),
        ("x.jsonl", '"a"\n', (None, None), "no rows with columns"),
        ("x.tsv", "", (None, None), "no rows"),
    ],
)
def test_files_that_lack_something(name, content, columns, message, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        CalibrationFile(str(tmp_path / name), "--dataset", *columns).texts(CONFIG, needs_labels=True)


def test_parquet_is_read(tmp_path):
    datasets = pytest.importorskip("datasets", reason="datasets reads parquet")
    datasets.Dataset.from_dict({"sentence": ["a film"], "label": [1]}).to_parquet(tmp_path / "x.parquet")
    rows = CalibrationFile(str(tmp_path / "x.parquet")).texts(CONFIG, needs_labels=True)
    assert rows == [{"text": "a film", "label": 1}]


def test_a_regression_has_numbers_for_labels(tmp_path):
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["a film", "3.5"]])
    rows = CalibrationFile(str(tmp_path / "x.csv")).texts(SimpleNamespace(num_labels=1), needs_labels=True)
    assert rows == [{"text": "a film", "label": 3.5}]


def test_dots_of_the_plot_are_where_the_cuts_are(monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    curve = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    draw_widths(
        [WidthLine("heads", 4, 3, curve), WidthLine("heads", 4, 4, curve), WidthLine("channels", 4, 1, curve)], "x"
    )
    heads, channels, kept, _ = drawn[0].axes
    low, high = channels.get_ylim()
    assert low < 1 and high > 4, "curves leave the picture"
    dots = [list(zip(*line.get_data(), strict=True)) for line in heads.lines if line.get_marker() == "o"]
    assert dots == [[(75.0, 1.0)]]
    assert [list(zip(*line.get_data(), strict=True)) for line in channels.lines if line.get_marker() == "o"] == [
        [(25.0, 4.0)]
    ]
    assert [bar.get_height() for bar in kept.patches] == [75, 100]
    draw_blocks([0.1, 0.3, 0.2], [1], "x", "cost")
    assert {(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in drawn[1].axes[0].containers[1]} == {
        (1, 0.3)
    }
