"""LoRA on packed layers: it trains unmerged, and a merge, which would break the zeros, refuses."""

import copy

import pytest
import torch
import torch.nn as nn
import transformers as tf

import sparsekit as sk
from sparsekit import SparseLinear, Unsupported
from sparsekit.nn import sparse_layers

peft = pytest.importorskip("peft", reason="peft is not installed")

IDS = torch.arange(24).view(4, 6) % 64


def packed_model(family="llama"):
    torch.manual_seed(0)
    if family == "llama":
        config = tf.LlamaConfig(
            vocab_size=64, max_position_embeddings=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2,
        )  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    else:
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    for name, module in model.named_modules():
        if name != "lm_head" and type(module).__name__ in ("Linear", "Conv1D"):
            w = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T
            groups = w.abs().reshape(w.shape[0], -1, 4)
            w.masked_fill_((groups.argsort(-1).argsort(-1) < 2).view(w.shape), 0)
    return sk.pack_(model)


def with_lora(model, **changes):
    options = dict(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj", "down_proj"]) | changes
    return peft.get_peft_model(model, peft.LoraConfig(**options))


def packed_bytes(model):
    return {
        name: {part: tensor.clone() for part, tensor in layer.packed().tensors.items()}
        for name, layer in sparse_layers(model).items()
    }


def same_bytes(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name][part], b[name][part]) for name in a for part in a[name])


@pytest.mark.parametrize(
    "family,targets", [("llama", ["q_proj", "up_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])]
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_trains_unmerged(family, targets, dora):
    model = with_lora(packed_model(family), target_modules=targets, use_dora=dora)
    before = packed_bytes(model)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all("lora" in name for name in trained)
    optimizer = torch.optim.AdamW(trained.values(), lr=5e-2)
    losses = []
    for _ in range(12):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in trained.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0], losses
    assert any(parameter.grad.any() for name, parameter in trained.items() if "lora_A" in name)
    assert same_bytes(packed_bytes(model), before), "the packed weights changed"


def test_gradients_are_those_of_a_dense_base():
    packed = packed_model()
    dense = sk.unpack_(copy.deepcopy(packed))
    torch.manual_seed(1)
    a = with_lora(packed, init_lora_weights=False)
    torch.manual_seed(1)
    b = with_lora(dense, init_lora_weights=False)
    for model in (a, b):
        model(input_ids=IDS, labels=IDS).loss.backward()
    grads = {name: parameter.grad for name, parameter in b.named_parameters() if parameter.grad is not None}
    assert grads
    for name, parameter in a.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-5)


def test_the_base_layers_are_packed():
    model = with_lora(packed_model())
    wrapped = [module for module in model.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(wrapped) == 6 and all(isinstance(module.base_layer, SparseLinear) for module in wrapped)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("merge", ["merge_and_unload", "merge_adapter"])
def test_merging_refuses_and_leaves_the_model_as_it_was(merge, safe_merge):
    model = with_lora(packed_model(), init_lora_weights=False).eval()
    before = packed_bytes(model)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    with pytest.raises(Unsupported, match=r"read-only.*keep adapters unmerged, or call sparsekit\.unpack_\(model\)"):
        getattr(model, merge)(safe_merge=safe_merge)
    assert same_bytes(packed_bytes(model), before)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_unload_gives_the_packed_model_back():
    base = packed_model().eval()
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    model = with_lora(base, init_lora_weights=False).unload()
    assert len(sparse_layers(model)) == 14
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_merging_after_unpacking_works():
    model = with_lora(packed_model(), init_lora_weights=False).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    sk.unpack_(model)
    merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=IDS).logits, expected, rtol=1e-3, atol=1e-4)


def test_untrained_adapters_are_not_packed():
    """lora_B is all zeros before training; packed it could never learn."""
    model = with_lora(sk.unpack_(packed_model()))
    sk.pack_(model)
    assert not any("lora" in name for name in sparse_layers(model))
    assert len(sparse_layers(model)) == 14


def test_adapters_are_saved_and_loaded(tmp_path):
    model = with_lora(packed_model(), init_lora_weights=False).eval()
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(packed_model(), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=IDS).logits, expected)


def test_disabled_adapters():
    base = packed_model().eval()
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
        model = with_lora(base, init_lora_weights=False).eval()
        with model.disable_adapter():
            assert torch.equal(model(input_ids=IDS).logits, expected)


def test_saving_a_peft_model_says_how_it_is_done(tmp_path):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(target_modules=["0"], r=2))
    with pytest.raises(ValueError, match="peft model: save its adapter with"):
        sk.save(wrapped, tmp_path / "m")
    assert not (tmp_path / "m").exists()
