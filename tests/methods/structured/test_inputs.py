"""Statistics of inputs count tokens, whatever the batches and the padding."""

import pytest
import torch

from sparsekit.archs import find_widths
from sparsekit.calibration import load_samples
from sparsekit.errors import NonFiniteError
from sparsekit.methods.structured.inputs import InputSums, input_sums, mean_length
from sparsekit.prune import prune_
from tests.archs.tiny_models import tiny_model, token_samples
from tests.methods.structured.test_structured import config_for


def test_sums_are_those_of_the_tokens():
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)) + 3
    sums = InputSums(7, torch.device("cpu"))
    for part in (x[:1], x[1:1], x[1:30], x[30:]):
        sums.add(part)
    exact = x.double()
    assert sums.num_tokens == 50
    torch.testing.assert_close(sums.mean, exact.mean(0))
    torch.testing.assert_close(sums.mean_abs, exact.abs().mean(0))
    torch.testing.assert_close(sums.rms, exact.square().mean(0).sqrt())
    torch.testing.assert_close(sums.variance, exact.var(0, correction=0))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_neither_padding_nor_batches_matter(family):
    model = tiny_model(family)
    readers = [width.name for width in find_widths(model)]
    rows = [sample[: 10 + 3 * index] for index, sample in enumerate(token_samples(4))]
    alone = [{"input_ids": row[None]} for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    padded = [{"input_ids": ids, "attention_mask": mask}]
    extra = {"input_ids": torch.nn.functional.pad(ids, (0, 9)), "attention_mask": torch.nn.functional.pad(mask, (0, 9))}
    plain = input_sums(model, readers, alone)
    for batches in (padded, [extra]):
        for name, sums in input_sums(model, readers, batches).items():
            assert sums.num_tokens == plain[name].num_tokens == sum(map(len, rows))
            torch.testing.assert_close(sums.mean_abs, plain[name].mean_abs, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(sums.rms, plain[name].rms, rtol=1e-4, atol=1e-6)
    for batches in (alone, padded, [extra]):
        assert mean_length(model, readers[0], batches) == sum(map(len, rows)) / 4


def test_what_never_ran_and_what_is_not_finite_is_said():
    model = tiny_model("bert")
    readers = [width.name for width in find_widths(model)]
    batches = load_samples(token_samples(2), model, num_samples=2).batches
    nothing = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4).long()}]
    with pytest.raises(ValueError, match="no token of the calibration data reached bert.encoder.layer.0"):
        input_sums(model, readers, nothing)
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.value.weight[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="the inputs of bert.encoder.layer.0.attention.output.dense hold NaN"):
        input_sums(model, readers, batches)
    assert mean_length(model, readers[0], []) is None


def test_the_length_of_images_is_their_patches():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4)
    model = ViTModel(config).eval()
    (reader, *_) = [width.name for width in find_widths(model)]
    assert mean_length(model, reader, [{"pixel_values": torch.zeros(3, 3, 16, 16)}]) == 17


def reader_of_letters():
    """A tokenizer that knows the letters from a to e, as words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcde"])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **names)


@pytest.mark.parametrize("method", ["contribution", "fisher", "kcm"])
@pytest.mark.parametrize("texts", [["x y z", "z z"], ["", " "]], ids=["of another language", "blank"])
def test_text_without_a_word_that_the_model_knows(method, texts):
    model = tiny_model("bert")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [{"text": text, "label": 1} for text in texts] if method == "fisher" else texts
    given = {"tokenizer": reader_of_letters(), "progress": False}
    with pytest.raises(ValueError, match="an unknown word or another special token: pass text|gave 0 tokens"):
        prune_(model, method, dataset=data, **given)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    config = config_for(method, model)
    assert prune_(model, config, dataset=[*data, *known(method)], **given).cuts


def known(method):
    texts = ["a b c", "c d e e", "a a d"]
    return [{"text": text, "label": 0} for text in texts] if method == "fisher" else texts
