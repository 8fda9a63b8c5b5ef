"""A teacher hands over hidden states and a head that make exactly the logits of its own forward."""

import copy
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from sparsekit.train.distill import Head, distillation_loss, square_head
from sparsekit.train.teachers import Teacher, teaching_copy

V = 97
SIZES = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
)  # fmt: skip
GPT2_SIZES = dict(vocab_size=V, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
OPT_SIZES = dict(
    vocab_size=V, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16,
    max_position_embeddings=64,
)  # fmt: skip
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=0.3)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT_SIZES)),
}


def tokens(*shape):
    return torch.randint(3, V, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama():
    torch.manual_seed(0)
    return MODELS["llama"]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_head_makes_the_models_own_logits(name, dtype):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).eval()
    batch = {"input_ids": tokens(3, 11), "attention_mask": torch.ones(3, 11, dtype=torch.long)}
    expected = model(**batch).logits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output = Teacher(model).outputs({**batch, "labels": tokens(3, 11), "teacher_ids": tokens(3, 11, 2)})
    assert isinstance(output, Head) and output.hidden.shape[:2] == (3, 11)
    torch.testing.assert_close(output.head(output.hidden), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_the_head_computes_under_the_autocast_of_its_body(llama):
    teacher, batch = Teacher(llama), {"input_ids": tokens(2, 9)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = teacher.outputs(batch)
        expected = llama(**batch).logits
    assert expected.dtype == torch.bfloat16
    assert torch.equal(output.head(output.hidden), expected)


def test_another_way_to_logits_is_noticed_and_said(llama):
    batch = {"input_ids": tokens(2, 9)}
    llama.config.final_logit_softcapping = 0.01  # a setting that the model does not follow
    teacher = Teacher(llama)
    with pytest.warns(UserWarning, match="LlamaForCausalLM makes its logits in a way of its own"):
        output = teacher.outputs(batch)
    assert torch.equal(output, llama(**batch).logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(teacher.outputs(batch), output)


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, None), lambda x: SimpleNamespace(logits=x)])
def test_a_plain_model_gives_whole_logits(wrap):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(V, 8), nn.Linear(8, V)

        def forward(self, input_ids):
            return wrap(self.head(self.embedding(input_ids)))

    model = Plain()
    with pytest.warns(UserWarning, match="Plain has no base model"):
        teacher = Teacher(model)
    output = teacher.outputs({"input_ids": tokens(2, 5), "labels": tokens(2, 5)})
    assert torch.equal(output, model.head(model.embedding(tokens(2, 5)))) and not output.requires_grad
    with pytest.raises((ValueError, TypeError)):
        teacher.outputs({"input_ids": tokens(2, 5)}, output_hidden_states=True)


def test_it_stays_frozen_and_in_eval_mode(llama):
    llama.config.attention_dropout = 0.5
    holder = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": Teacher(llama)})
    holder.train()
    assert holder["student"].training and not any(module.training for module in holder["teacher"].modules())
    assert not any(parameter.requires_grad for parameter in holder["teacher"].parameters())


def test_only_the_student_gets_a_gradient(llama):
    student, batch = copy.deepcopy(llama), {"input_ids": tokens(2, 9)}
    teacher = Teacher(llama)
    output = teacher.outputs(batch, output_hidden_states=True)
    assert len(teacher.hidden_states) == 3
    out = student(**batch, output_hidden_states=True)
    loss = distillation_loss(out.logits, output, tokens(2, 9), kd_weight=1.0, ce_weight=0.0, temperature=2.0)
    assert loss.kd.item() == 0
    total = loss.total + square_head(out.hidden_states[1:], teacher.hidden_states[1:])
    total.backward()
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert all(not parameter.grad.any() for parameter in student.parameters())  # it is its own teacher


def test_the_embeddings_are_found(llama):
    assert Teacher(llama).get_input_embeddings() is llama.get_input_embeddings()


# --- a copy to teach from -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_copy_for_autocast_says_the_same_in_half_the_bytes(name, dtype):
    """Bit for bit: hidden states and logits. What is tied to an embedding keeps its bits, for that reads them."""
    torch.manual_seed(0)
    model, batch = MODELS[name]().eval(), {"input_ids": tokens(3, 11)}
    state = {key: value.clone() for key, value in model.state_dict().items()}
    small, whole = Teacher(teaching_copy(model, dtype)), Teacher(copy.deepcopy(model))
    with torch.autocast("cpu", dtype=dtype):
        found, expected = (teacher.outputs(batch, output_hidden_states=True) for teacher in (small, whole))
        assert torch.equal(found.head(found.hidden), expected.head(expected.hidden))
    assert all(torch.equal(*pair) for pair in zip(small.hidden_states, whole.hidden_states, strict=True))
    cast = {key for key, value in small.model.state_dict().items() if value.dtype == dtype}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    is_linear = [key for key in state if any(part in key for part in ("proj", "fc", "c_attn"))]
    assert cast == set(is_linear) | (set() if tied else {"lm_head.weight"})
    assert tied == (small.model.get_output_embeddings().weight is small.model.get_input_embeddings().weight)
    assert all(
        torch.equal(value, state[key]) and value.dtype == torch.float32 for key, value in model.state_dict().items()
    )
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_without_autocast_a_copy_is_a_copy(llama):
    twin = teaching_copy(llama)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in llama.state_dict().items())
    ours = {parameter.data_ptr() for parameter in llama.parameters()}
    assert not ours & {parameter.data_ptr() for parameter in twin.parameters()}
    half = teaching_copy(copy.deepcopy(llama).bfloat16(), torch.float16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}, "fewer bits are not other bits"
