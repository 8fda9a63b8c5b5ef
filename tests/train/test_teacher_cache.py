"""A teacher on disk says what the teacher in memory says, and refuses what it was not asked."""

import json
import pickle

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparsekit.errors import CheckpointError, NonFiniteError
from sparsekit.train.data import TokenSamples, collate, training_samples
from sparsekit.train.distill import TopK, distillation_loss
from sparsekit.train.teacher_cache import CachedTeacher, write_teacher_cache

V = 97


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 20  # a distribution far from uniform
    return model


def chunks(*lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (length,), generator=generator) for length in lengths]


def probabilities(model, ids, temperature):
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=ids[None]).logits[0].float() / temperature, -1)


RAGGED = (9, 9, 4, 12, 2, 7, 7)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_it_holds_the_likeliest_tokens_of_each_place(model, tmp_path, batch_size):
    data = chunks(*RAGGED)
    cache = write_teacher_cache(
        model, data, tmp_path / "c", top_k=5, temperature=1.5, batch_size=batch_size, progress=False
    )
    assert (len(cache), cache.vocabulary, cache.temperature, cache.top_k) == (7, V, 1.5, 5)
    for index, ids in enumerate(data):
        expected = probabilities(model, ids, 1.5).topk(5)
        top = cache[cache.find(ids)]
        assert cache.find(ids) == index and top.ids.shape == (len(ids), 5)
        torch.testing.assert_close(top.log_probs.float(), expected.values, rtol=1e-3, atol=1e-3)
        own = probabilities(model, ids, 1.5).gather(1, top.ids.long())
        torch.testing.assert_close(own, expected.values, rtol=1e-4, atol=1e-4)  # ids may differ at ties alone


def test_the_model_is_left_as_it_was(model, tmp_path):
    model.train().requires_grad_(True)
    model.lm_head.weight.requires_grad_(False)
    before = [(parameter.requires_grad, parameter.clone()) for parameter in model.parameters()]
    write_teacher_cache(model, chunks(5, 5), tmp_path / "c", top_k=3, progress=False)
    assert model.training and model.model.layers[0].mlp.training
    for (requires_grad, value), parameter in zip(before, model.parameters(), strict=True):
        assert parameter.requires_grad == requires_grad and torch.equal(value, parameter)
    model.lm_head.weight.requires_grad_(True)


def test_samples_come_back_in_any_order_with_what_the_teacher_said(model, tmp_path):
    data = chunks(*RAGGED)
    cache = write_teacher_cache(model, data, tmp_path / "c", top_k=4, temperature=2.0, progress=False)
    chosen = training_samples([data[i] for i in (5, 0, 3)], model)
    taught = cache.attach(chosen, temperature=2.0, vocabulary=V)
    assert isinstance(taught, TokenSamples) and len(taught) == 3 and taught.num_tokens == 28
    for sample, index in zip([taught[i] for i in range(3)], (5, 0, 3), strict=True):
        assert torch.equal(sample["input_ids"], data[index]) and torch.equal(sample["labels"], data[index])
        assert torch.equal(sample["teacher_ids"], cache[index].ids)
        assert torch.equal(sample["teacher_log_probs"], cache[index].log_probs)
    batch = collate([taught[i] for i in range(3)])
    assert batch["teacher_ids"].shape == batch["teacher_log_probs"].shape == (3, 12, 4)


def test_a_worker_process_maps_the_files_again(model, tmp_path):
    cache = write_teacher_cache(model, chunks(*RAGGED), tmp_path / "c", top_k=4, progress=False)
    taught = cache.attach(training_samples(chunks(*RAGGED), model), temperature=2.0)
    sent = pickle.dumps(taught)
    assert torch.equal(pickle.loads(sent)[3]["teacher_ids"], taught[3]["teacher_ids"])
    assert len(pickle.dumps(cache)) < 500


def test_a_full_cache_gives_the_exact_loss(model, tmp_path):
    data = training_samples(chunks(9, 9, 4), model)
    cache = write_teacher_cache(model, data, tmp_path / "c", top_k=V, temperature=2.0, progress=False)
    batch = collate([cache.attach(data, 2.0)[i] for i in range(3)])
    labels = batch["labels"]
    student = torch.randn(*labels.shape, V)
    teacher = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.detach()
    options = dict(kd_weight=1.0, ce_weight=0.0, temperature=2.0)
    cached = TopK(batch["teacher_ids"], batch["teacher_log_probs"])
    exact = distillation_loss(student, teacher, labels, **options).total
    torch.testing.assert_close(distillation_loss(student, cached, labels, **options).total, exact, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("vocabulary,itemsize", [(V, 2), (65536, 2), (65537, 4)])
def test_ids_take_the_bytes_they_need(tmp_path, vocabulary, itemsize):
    class Fixed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = torch.nn.Parameter(torch.arange(vocabulary, dtype=torch.float32) / vocabulary)

        def forward(self, input_ids):
            return self.bias.expand(*input_ids.shape, vocabulary)

    with pytest.warns(UserWarning, match="whole batch"):
        cache = write_teacher_cache(Fixed(), [torch.tensor([1, 2])], tmp_path / "c", top_k=2, progress=False)
    assert cache[0].ids.tolist() == [[vocabulary - 1, vocabulary - 2]] * 2
    assert np.load(tmp_path / "c" / "ids.npy").dtype.itemsize == itemsize


def test_other_tokens_temperature_or_vocabulary_are_refused(model, tmp_path):
    data = chunks(*RAGGED)
    cache = write_teacher_cache(model, data, tmp_path / "c", top_k=4, temperature=2.0, progress=False)
    same = training_samples(data, model)
    with pytest.raises(ValueError, match="temperature 2, and 1 is asked for"):
        cache.attach(same, 1.0)
    with pytest.raises(ValueError, match="knew 97 tokens, the student knows 98"):
        cache.attach(same, 2.0, vocabulary=98)
    data[3] = data[3].clone()
    data[3][-1] = 2
    with pytest.raises(ValueError, match="other data: 1 of 7 samples are not in it, the first is sample 3"):
        cache.attach(training_samples(data, model), 2.0)
    with pytest.raises(ValueError, match="does not hold the 8 tokens"):
        cache.find(data[0][:-1])
    with pytest.raises(IndexError, match="sample 7"):
        cache[7]


@pytest.mark.parametrize(
    "option,match",
    [
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": V + 1}, "top_k=98 of a vocabulary of 97"),
        ({"batch_size": True}, "batch_size=True"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
    ],
)
def test_bad_options_write_nothing(model, tmp_path, option, match):
    with pytest.raises(ValueError, match=match):
        write_teacher_cache(model, chunks(5, 5), tmp_path / "c", progress=False, **{"top_k": 3, **option})
    assert not list(tmp_path.iterdir())


def test_a_failed_call_leaves_the_old_cache(model, tmp_path):
    write_teacher_cache(model, chunks(5, 6), tmp_path / "c", top_k=3, progress=False)
    before = {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()}
    weight = model.model.norm.weight.data.clone()
    model.model.norm.weight.data[0] = float("nan")
    try:
        with pytest.raises(NonFiniteError, match="samples 0 to 1"):
            write_teacher_cache(model, chunks(5, 5, seed=2), tmp_path / "c", top_k=3, progress=False)
    finally:
        model.model.norm.weight.data.copy_(weight)
    assert {path.name: path.read_bytes() for path in (tmp_path / "c").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_cache_replaces_an_older_one_and_tells_nothing_of_the_machine(model, tmp_path):
    write_teacher_cache(model, chunks(5, 6), tmp_path / "c", top_k=3, progress=False)
    cache = write_teacher_cache(model, chunks(7), tmp_path / "c", top_k=2, temperature=1.0, progress=False)
    assert (len(cache), cache.top_k, cache.temperature) == (1, 2, 1.0)
    text = (tmp_path / "c" / "teacher.json").read_text()
    assert str(tmp_path) not in text and json.loads(text)["architecture"] == "LlamaForCausalLM"


def test_a_broken_cache_is_refused(model, tmp_path):
    folder = tmp_path / "c"
    write_teacher_cache(model, chunks(5, 6), folder, top_k=3, progress=False)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(name, content, match):
        path = folder / name
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=match):
            CachedTeacher(folder)
        path.write_bytes(whole[name])

    with pytest.raises(CheckpointError, match="is no teacher cache"):
        CachedTeacher(tmp_path)
    broken("teacher.json", None, "is no teacher cache")
    broken("teacher.json", b"{", "cannot be read")
    broken("teacher.json", b"[1]", "cannot be read")
    broken("teacher.json", whole["teacher.json"].replace(b'"format": 1', b'"format": 2'), "layout 2")
    broken("ids.npy", whole["ids.npy"][:-1], "missing or truncated")
    broken("digests.npy", None, "missing or truncated")
    broken("log_probs.npy", whole["digests.npy"], "teacher.json says")
    assert len(CachedTeacher(folder)) == 2


def test_text_is_cut_as_the_training_cuts_it(wikilm, tmp_path):
    from transformers import AutoTokenizer

    model, tokenizer = LlamaForCausalLM.from_pretrained(wikilm), AutoTokenizer.from_pretrained(wikilm)
    texts = (wikilm.parent / "text" / "valid.txt").read_text().splitlines()[:12]
    cache = write_teacher_cache(
        model, texts, tmp_path / "c", tokenizer=tokenizer, max_seq_length=64, top_k=64, progress=False
    )
    data = training_samples(texts, model, tokenizer, 64)
    batch = collate([cache.attach(data, 2.0, 4096)[i] for i in range(2)])
    labels = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"]).logits
    cached = TopK(batch["teacher_ids"], batch["teacher_log_probs"])
    loss = distillation_loss(logits, cached, labels, kd_weight=1.0, ce_weight=0.0, temperature=2.0)
    assert 0 <= loss.kd.item() < 1e-3  # its own teacher, but for fp16
