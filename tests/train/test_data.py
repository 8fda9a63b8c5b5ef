"""What a user has becomes samples with labels, or a message that says what is wrong with it."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from sparsekit.train.data import IGNORED, TokenSamples, collate, training_samples


class Model(nn.Module):
    """As much of a language model as reading data asks for."""

    def __init__(self, vocabulary=50, positions=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 4)
        self.config = SimpleNamespace(
            vocab_size=vocabulary, max_position_embeddings=positions, is_encoder_decoder=False
        )

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        return self.embedding(input_ids)


class Wide(Model):
    """The same with a vocabulary of any size, which no table is made for."""

    def __init__(self, vocabulary):
        super().__init__()
        self.vocabulary = vocabulary

    def get_input_embeddings(self):
        return SimpleNamespace(num_embeddings=self.vocabulary)


class Letters:
    """A tokenizer: a letter is its place in the alphabet, and a text ends with 0."""

    eos_token_id = 0
    bos_token_id = None
    pad_token_id = None

    def __call__(self, text, **kwargs):
        texts = [text] if isinstance(text, str) else text
        ids = [[ord(letter) - ord("a") + 1 for letter in one] for one in texts]
        return {"input_ids": ids[0] if isinstance(text, str) else ids}


def test_text_is_one_stream_cut_into_chunks(tmp_path):
    texts = ["abcdefgh", "ijklmnopqrs", "tuvwxyz"]
    (tmp_path / "text.txt").write_text("\n".join(texts))
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    for dataset in (texts, tmp_path / "text.txt", str(tmp_path / "text.jsonl")):
        samples = training_samples(dataset, Model(), Letters(), max_seq_length=10)
        assert all(len(sample["input_ids"]) == 10 for sample in (samples[i] for i in range(len(samples))))
        stream = torch.cat([samples[i]["input_ids"] for i in range(len(samples))])
        letters = stream[(stream > 0) & (stream < 27)]
        assert torch.equal(letters, torch.arange(1, len(letters) + 1)) and len(letters) >= 17
        assert all(torch.equal(samples[i]["input_ids"], samples[i]["labels"]) for i in range(len(samples)))
        assert samples.num_tokens == 10 * len(samples)


def test_a_chunk_is_no_longer_than_the_model_has_positions():
    samples = training_samples(["abcdefghij" * 10], Model(positions=16), Letters(), max_seq_length=2048)
    assert {len(samples[i]["input_ids"]) for i in range(len(samples))} == {16}


@pytest.mark.parametrize(
    "dataset",
    [
        torch.arange(24).view(3, 8),
        list(torch.arange(24).view(3, 8)),
        [torch.arange(8)[None], torch.arange(8, 24).view(2, 8)],
        [{"input_ids": list(range(8))}, {"input_ids": list(range(8, 16))}, {"input_ids": list(range(16, 24))}],
        DataLoader([{"input_ids": torch.arange(i, i + 8)} for i in (0, 8, 16)], batch_size=2),
    ],
    ids=["tensor", "rows", "batches", "dicts", "loader"],
)
def test_tokens_are_used_as_they_are(dataset):
    samples = training_samples(dataset, Model())
    assert len(samples) == 3
    for index in range(3):
        assert torch.equal(samples[index]["input_ids"], torch.arange(8 * index, 8 * index + 8))
        assert torch.equal(samples[index]["labels"], samples[index]["input_ids"])
    assert training_samples(samples, Model()) is samples


@pytest.mark.parametrize(
    "vocabulary,high,dtype",
    [(50, 49, torch.int16), (40000, 32767, torch.int16), (40000, 32768, torch.int32), (2**33, 2**32, torch.int64)],
)
def test_ids_are_held_in_few_bytes_and_handed_out_as_ever(vocabulary, high, dtype):
    rows = [torch.tensor([0, 5, high]), torch.tensor([high, 1, 2])]
    samples = training_samples(rows, Wide(vocabulary))
    for index, row in enumerate(rows):
        held, given = samples.samples[index], samples[index]
        assert held["input_ids"].dtype == dtype and held["labels"].data_ptr() == held["input_ids"].data_ptr()
        for key in ("input_ids", "labels"):
            assert given[key].dtype == torch.int64 and torch.equal(given[key], row)
    assert collate([samples[0], samples[1]])["input_ids"].dtype == torch.int64
    wide = hashlib.sha256()
    for row in rows:
        for _ in ("input_ids", "labels"):
            wide.update(row.numpy().tobytes())
    assert samples.digest == wide.hexdigest()[:16], "a run that began with wider ids can be resumed"


def test_text_takes_two_bytes_a_token():
    samples = training_samples(["abcdefghij" * 500], Model(), Letters(), max_seq_length=10)
    stored = {sample[key].untyped_storage().data_ptr() for sample in samples.samples for key in sample}
    assert len(stored) == 1 and samples.samples[0]["labels"].untyped_storage().nbytes() == 2 * 5001


def test_masks_and_labels_of_ones_own_are_held_in_few_bytes_too():
    row = {"input_ids": [5, 6, 7, 0], "labels": [IGNORED, 6, 7, IGNORED], "attention_mask": [1, 1, 1, 0]}
    samples = training_samples([row], Model())
    assert {value.dtype for value in samples.samples[0].values()} == {torch.int16}
    assert {key: value.tolist() for key, value in samples[0].items()} == row
    assert {value.dtype for value in samples[0].values()} == {torch.int64}
    soft = training_samples([{"input_ids": [5, 6], "attention_mask": [0.5, 1.5]}], Model())
    assert soft[0]["attention_mask"].tolist() == [0.5, 1.5]


def test_ids_that_would_wrap_around_are_seen():
    for row in ([1, 65536 + 3], [1, 2**32 + 3]):
        with pytest.raises(ValueError, match=f"token ids from 1 to {row[1]}, and the model knows 0 to 49"):
            training_samples([torch.tensor(row)], Model())


def test_labels_are_those_given_or_what_is_attended_to():
    labels = [IGNORED, IGNORED, 7, 8]
    given = training_samples([{"input_ids": [5, 6, 7, 8], "labels": labels}], Model())
    assert given[0]["labels"].tolist() == labels
    padded = training_samples([{"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]}], Model())
    assert padded[0]["labels"].tolist() == [5, 6, IGNORED, IGNORED]
    assert padded[0]["attention_mask"].tolist() == [1, 1, 0, 0]


def test_shorter_samples_are_padded_with_what_is_not_learnt():
    samples = training_samples([torch.arange(1, 6), torch.arange(1, 4)], Model())
    batch = collate([samples[0], samples[1]])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert batch["labels"].tolist() == [[1, 2, 3, 4, 5], [1, 2, 3, IGNORED, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    alike = collate([samples[0], samples[0]])
    assert alike.keys() == {"input_ids", "labels"}


def test_what_else_a_sample_holds_is_padded_along_its_tokens():
    rows = [
        {"input_ids": torch.arange(n), "labels": torch.arange(n), "teacher_ids": torch.ones(n, 3, dtype=torch.int32)}
        for n in (4, 2)
    ]
    batch = collate(rows)
    assert batch["teacher_ids"].shape == (2, 4, 3) and batch["teacher_ids"][1, 2:].eq(0).all()
    assert batch["labels"].dtype == torch.int64 and isinstance(TokenSamples(rows)[0], dict)


@pytest.mark.parametrize(
    "dataset,message",
    [
        (None, "no dataset"),
        ([], "dataset is empty"),
        (["abc"], "tokenizer"),
        ([torch.rand(4)], "training needs text, or whole numbers"),
        ([torch.ones(4, dtype=torch.bool)], "training needs text, or whole numbers"),
        ([{"pixels": torch.ones(4)}], r"\['pixels'\]: training needs text"),
        (
            [torch.arange(4), torch.tensor([1, 50])],
            "sample 1 holds token ids from 1 to 50, and the model knows 0 to 49",
        ),
        ([torch.tensor([-1, 3])], "token ids from -1 to 3"),
        ([{"input_ids": [1, 2], "labels": [1, 60]}], "labels from 60 to 60, and the model knows 0 to 49"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2]}], "3 input_ids and 2 labels"),
        ([torch.arange(17)], "sample 0 holds 17 tokens, the model has 16 positions: cut it"),
        ([torch.arange(3), torch.tensor([4])], "sample 1 of 1 tokens has none to predict"),
        ([torch.arange(3), torch.zeros(0, dtype=torch.long)], "sample 1 of 0 tokens"),
        ([{"input_ids": [1, 2], "labels": [1, IGNORED]}], "none to predict"),
        ([torch.ones(2, 2, 2, dtype=torch.long)], r"shape \[2, 2, 2\]"),
        ([{"input_ids": [1, 2]}, {"input_ids": [1, 2], "attention_mask": [1, 1]}], "sample 1 holds.*sample 0"),
    ],
)
def test_bad_data_is_named(dataset, message):
    with pytest.raises(ValueError, match=message):
        training_samples(dataset, Model())


def test_too_little_text_for_one_sample():
    with pytest.raises(
        ValueError, match="gave [0-9]+ tokens, and one sample takes 12: pass more text, or a max_seq_length"
    ):
        training_samples(["abc"], Model(), Letters(), max_seq_length=12)
