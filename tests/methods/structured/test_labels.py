"""Labels come with rows, with batches, or from the tokens themselves; where they are missing it is said."""

import pytest
import torch

from sparsekit.methods.structured.labels import labelled_batches
from tests.archs.tiny_models import tiny_model, token_samples

GIVEN = {"num_samples": 7, "max_length": 20, "batch_size": 3, "seed": 0}


class Words:
    """A tokenizer that gives each word a number."""

    pad_token_id = 5

    def __call__(self, text, truncation, max_length):
        ids = [10 + len(word) for word in text.split()][:max_length]
        return {"input_ids": ids, "token_type_ids": [0] * len(ids), "attention_mask": [1] * len(ids)}


def rows(num=9, key="label"):
    return [{"text": " ".join("a" * (index + 1) for _ in range(index + 1)), key: index % 3} for index in range(num)]


@pytest.mark.parametrize("key", ["label", "labels"])
def test_rows_of_text_are_padded_at_the_end(key):
    batches = labelled_batches(rows(key=key), tiny_model("bert"), Words(), **GIVEN)
    assert [len(batch["labels"]) for batch in batches] == [3, 3, 1]
    seen = set()
    for batch in batches:
        assert batch["input_ids"].shape == batch["token_type_ids"].shape == batch["attention_mask"].shape
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            length = int(mask.sum())
            assert bool(mask[:length].all()) and bool((ids[length:] == 5).all())
            assert bool((ids[:length] == 10 + length).all()) and label == (length - 1) % 3
            seen.add(length)
    assert len(seen) == 7, "drawn without replacement"
    again = labelled_batches(rows(key=key), tiny_model("bert"), Words(), **GIVEN)
    assert all(torch.equal(one[name], other[name]) for one, other in zip(batches, again, strict=True) for name in one)


def test_rows_that_are_padded_already_lose_it():
    row = {"input_ids": [3, 4, 5, 0, 0], "attention_mask": [1, 1, 1, 0, 0], "label": 2}
    (batch,) = labelled_batches([row] * 2, tiny_model("bert"), None, **GIVEN)
    assert batch["input_ids"].tolist() == [[3, 4, 5]] * 2 and batch["labels"].tolist() == [2, 2]


def test_batches_are_taken_as_they_come():
    batch = {"input_ids": torch.ones(4, 6).long(), "labels": torch.arange(4) % 3, "note": "no tensor"}
    found = labelled_batches([batch] * 5, tiny_model("bert"), None, **GIVEN)
    assert len(found) == 2 and set(found[0]) == {"input_ids", "labels"}


def test_a_language_model_needs_none():
    model = tiny_model("llama")
    batches = labelled_batches(token_samples(5), model, None, **GIVEN)
    assert all(torch.equal(batch["labels"], batch["input_ids"]) for batch in batches)
    padded = {"input_ids": torch.ones(2, 4).long(), "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}
    (batch,) = labelled_batches([padded], model, None, **GIVEN)
    assert batch["labels"].tolist() == [[1, 1, 1, 1], [1, 1, -100, -100]]


def test_images_are_stacked():
    found = [{"pixel_values": torch.full((3, 4, 4), float(index)), "labels": index % 3} for index in range(4)]
    batches = labelled_batches(found, tiny_model("bert"), None, **GIVEN)
    assert [tuple(batch["pixel_values"].shape) for batch in batches] == [(3, 3, 4, 4), (1, 3, 4, 4)]
    assert all(torch.equal(batch["pixel_values"][:, 0, 0, 0].long() % 3, batch["labels"]) for batch in batches)


@pytest.mark.parametrize(
    "dataset,message",
    [
        (["a text", "another"], "dataset is a list without labels, and this method learns from labels.*'contribution'"),
        ("train.txt", "dataset is a str without labels"),
        (None, "dataset is a NoneType without labels"),
        ([], "dataset is empty"),
        ([{"text": "a"}], r"dataset rows hold \['attention_mask', 'input_ids', 'token_type_ids'\].*add 'labels'"),
    ],
)
def test_missing_labels_are_an_error(dataset, message):
    with pytest.raises(ValueError, match=message):
        labelled_batches(dataset, tiny_model("bert"), Words(), **GIVEN)


def test_text_needs_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        labelled_batches(rows(), tiny_model("bert"), None, **GIVEN)


def test_labels_that_the_model_does_not_know():
    with pytest.raises(ValueError, match="dataset has the label 2, and the model knows 0 to 1"):
        labelled_batches(rows(), tiny_model("distilbert"), Words(), **GIVEN)
