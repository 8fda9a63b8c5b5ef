"""Perplexity: worked by hand, on real weights, and where it must refuse."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sparsekit.evaluate import perplexity, read_documents, read_tokens

DEMO = Path(__file__).resolve().parents[1] / "demo"


class Fixed(torch.nn.Module):
    """Predicts the next token as (token + 1) with probability `right`, the others alike."""

    def __init__(self, vocab_size=5, right=0.5, positions=64):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.right, self.config = right, SimpleNamespace(vocab_size=vocab_size, max_position_embeddings=positions)
        self.calls = []

    def forward(self, input_ids):
        self.calls.append(tuple(input_ids.shape))
        V = self.config.vocab_size
        probability = torch.full((*input_ids.shape, V), (1 - self.right) / (V - 1))
        probability.scatter_(-1, ((input_ids + 1) % V)[..., None], self.right)
        return SimpleNamespace(logits=probability.log())


class Letters:
    """a -> 0, b -> 1, ...; the end of text is 4."""

    eos_token_id = 4

    def __call__(self, texts, add_special_tokens, verbose):
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) - ord("a") for letter in text] for text in texts]}


def test_worked_example():
    """Stream 0 1 2 4 | 0 1 2 4 in chunks of 4: four steps are foreseen (p 1/2), two, 2 -> 4, are not (p 1/8)."""
    found = perplexity(Fixed(), ["abc", "abc"], Letters(), max_seq_length=4, progress=False)
    assert found.value == pytest.approx(math.exp(-(4 * math.log(1 / 2) + 2 * math.log(1 / 8)) / 6))
    assert (found.num_tokens, found.num_predicted) == (8, 6)
    assert found.tokens_per_second > 0 and float(found) == found.value


def test_the_rest_after_the_last_whole_chunk_is_left_out():
    assert perplexity(Fixed(), ["abcabcabc"], Letters(), max_seq_length=4, progress=False).num_tokens == 8


def test_short_text_is_one_chunk():
    assert perplexity(Fixed(), ["ab"], Letters(), progress=False).num_tokens == 3


def test_batches_do_not_change_the_value():
    ids = [torch.arange(60) % 5]
    alone = perplexity(Fixed(right=0.9), ids, max_seq_length=6, batch_size=1, progress=False)
    together = perplexity(Fixed(right=0.9), ids, max_seq_length=6, batch_size=7, progress=False)
    assert alone.value == pytest.approx(together.value)


def test_max_tokens():
    assert perplexity(Fixed(), [torch.zeros(40).long()], max_seq_length=4, max_tokens=9, progress=False).num_tokens == 8


def test_modes_are_put_back():
    model = Fixed().train()
    perplexity(model, ["abc"], Letters(), progress=False)
    assert model.training


def test_the_demo_model_has_its_perplexity():
    """All of valid gives the 29.53 of the model's card (not run here); the first 8192 tokens against a plain loop."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "wikilm", dtype=torch.float32)
    ids = read_tokens(DEMO / "text/valid.txt", AutoTokenizer.from_pretrained(DEMO / "wikilm"))
    with torch.no_grad():
        chunks = ids[:8192].view(32, 256)
        expected = sum(model(c[None], labels=c[None]).loss.item() for c in chunks) / 32
    found = perplexity(model, [ids], max_seq_length=256, max_tokens=8192, progress=False)
    assert found.value == pytest.approx(math.exp(expected), rel=1e-4)
    assert 15 < found.value < 45


def test_the_demo_text_has_the_perplexity_of_the_demo():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(DEMO / "wikilm", dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "wikilm")
    options = {"max_seq_length": 256, "max_tokens": 4096, "progress": False}
    from_text = perplexity(model, DEMO / "text/valid.txt", tokenizer, **options)
    documents = (DEMO / "text/valid.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id] for text in documents]
    assert perplexity(model, ids, **options).value == from_text.value


def test_every_file_kind_reads_the_same(tmp_path):
    texts = ["one", "", "two\u2028three"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    for name in ("a.txt", "a.jsonl"):
        assert list(read_documents(tmp_path / name)) == texts
    assert list(read_documents([{"text": text} for text in texts])) == texts


def test_datasets_are_read_as_calibration_reads_them(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ["abc", "abd"]})
    table.to_parquet(tmp_path / "a.parquet")
    expected = [0, 1, 2, 4, 0, 1, 3, 4]
    assert read_tokens(table, Letters()).tolist() == expected
    assert read_tokens(tmp_path / "a.parquet", Letters()).tolist() == expected
    with pytest.raises(ValueError, match="splits"):
        perplexity(Fixed(), datasets.DatasetDict(train=table, test=table), Letters(), progress=False)


def test_tensors_batches_and_padding():
    rows = torch.tensor([[0, 1, 2], [3, 4, 0]])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(rows), batch_size=2)
    padded = {"input_ids": rows, "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert read_tokens(loader).tolist() == read_tokens(rows).tolist() == [0, 1, 2, 3, 4, 0]
    assert read_tokens([padded]).tolist() == [0, 1, 2, 3, 4]
    assert read_tokens([[0, 1], [2]]).tolist() == [0, 1, 2]


def test_a_tokenizer_of_the_package_tokenizers():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert read_tokens(["a b", "c"], tokenizer).tolist() == [0, 1, 2]


def test_a_model_without_parameters():
    model = Fixed()
    del model.weight
    assert perplexity(model, ["abc"], Letters(), progress=False).num_tokens == 4


def test_only_causal_models_have_a_perplexity():
    from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaModel

    small = {"vocab_size": 8, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    for model in (BertForMaskedLM(BertConfig(**small)), LlamaModel(LlamaConfig(**small))):
        with pytest.raises(ValueError, match=f"{type(model).__name__} is no causal language model"):
            perplexity(model, [torch.arange(8)], progress=False)


@pytest.mark.parametrize("name", ["max_tokens", "batch_size", "max_seq_length"])
@pytest.mark.parametrize("value", [0, -4, 2.0, True, "8"])
def test_numbers_are_checked(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*whole number"):
        perplexity(Fixed(), ["abc"], Letters(), progress=False, **{name: value})


@pytest.mark.parametrize(
    "dataset, message",
    [
        ([], "empty"),
        ([""], "0 tokens"),
        ([[0]], "1 tokens"),
        ([torch.tensor([0.5, 1.5])], "whole numbers"),
        ([torch.tensor([True, False])], "whole numbers"),
        (["abc"], "tokenizer"),
        ([torch.tensor([1, 9])], "vocabulary of 5"),
        ([3.5], "float"),
        (7, "int"),
        ([{"label": 1}], "'text' nor 'input_ids'"),
        ([torch.tensor([1, -100])], "vocabulary of 5"),
    ],
)
def test_refuses(dataset, message):
    with pytest.raises(ValueError, match=message):
        perplexity(Fixed(), dataset, Letters() if dataset == [""] else None, progress=False)


def test_refuses_lengths_the_model_cannot_read():
    with pytest.raises(ValueError, match="64 positions"):
        perplexity(Fixed(), ["abc"], Letters(), max_seq_length=65, progress=False)
    with pytest.raises(ValueError, match="at least 2"):
        perplexity(Fixed(), ["abc"], Letters(), max_seq_length=1, progress=False)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        read_tokens(tmp_path / "none.txt", Letters())
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text"\n')
    with pytest.raises(ValueError):
        read_tokens(tmp_path / "a.jsonl", Letters())
    (tmp_path / "a.csv").write_text("text\na\n")
    with pytest.raises(ValueError, match="a.csv"):
        read_tokens(tmp_path / "a.csv", Letters())
