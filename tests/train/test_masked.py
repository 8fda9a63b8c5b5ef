"""Masked models against zeroed weights and sliced models, with adapters, checkpointing and 16-bit numbers."""

import copy
import warnings

import pytest
import torch

from sparsekit.plan import Plan
from sparsekit.surgery import apply_
from sparsekit.targets import weight_NK
from sparsekit.train.gates import Gates
from sparsekit.train.masked import Masked, leaves_of, pass_gradients_
from tests.archs.tiny_models import tiny_model, token_samples

ALL = ("heads", "channels", "hidden", "layers")
FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "opt", "gpt2"]


def kinds_of(family):
    return ("heads", "channels", "layers") if family in ("opt", "gpt2") else ALL


@pytest.fixture
def wide(llama):
    """Make a Llama of two layers, with so many query heads to a key-value head, and biases where others have none."""

    def make(num_key_value_heads=2, dtype=torch.float32, bias=False):
        heads = {"num_attention_heads": 4, "num_key_value_heads": num_key_value_heads, "num_hidden_layers": 3}
        model = llama(dtype, **heads, attention_bias=bias, mlp_bias=bias)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "proj" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return make


def ids(vocabulary=61, num=2, length=9):
    return torch.randint(1, vocabulary, (num, length), generator=torch.Generator().manual_seed(1))


def some_masks(gates, binary=True, seed=0):
    """Masks with something closed and something open in every part, but for layers, which stay."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, size in gates.sizes.items():
        values = torch.rand(size, generator=generator)
        closed = values.argsort()[: 2 * (size // 4) if gates.kinds[name] == "hidden" else size // 2]
        masks[name] = (torch.ones(size) if binary else values + 0.1).index_fill(0, closed, 0.0)
        if gates.kinds[name] == "layers":
            masks[name] = torch.ones(size)
    return masks


def sliced(model, gates, masks):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return apply_(copy.deepcopy(model), Plan(cuts=gates.cuts(masks)))


def assert_same(found, wanted, limit=1e-5):
    assert float((found - wanted).abs().max()) <= limit * float(wanted.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_open_masks_are_the_model_bit_for_bit(family, dtype):
    model = tiny_model(family).to(dtype)
    gates = Gates.of(model, kinds_of(family))
    dense = model(ids()).logits
    masked = Masked.of(model, gates)
    assert masked.masks is None and torch.equal(model(ids()).logits, dense)
    for ones in ({name: torch.ones(size) for name, size in gates.sizes.items()}, {}):
        masked.masks = ones
        assert torch.equal(model(ids()).logits, dense)
    masked.masks = {name: mask.bool() for name, mask in some_masks(gates).items()}
    assert not torch.equal(model(ids()).logits, dense)
    masked.masks = None
    assert torch.equal(model(ids()).logits, dense)
    masked.masks = some_masks(gates)
    masked.remove()
    assert torch.equal(model(ids()).logits, dense)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@torch.no_grad()
def test_masks_of_units_are_factors_of_the_columns_that_read_them(family, binary):
    model = tiny_model(family)
    gates = Gates.of(model)
    masks = some_masks(gates, binary)
    folded = copy.deepcopy(model)
    for width in gates.widths:
        w_NK = weight_NK(folded.get_submodule(width.name))
        for unit in range(width.num_units):
            w_NK[:, unit * width.columns : (unit + 1) * width.columns] *= masks[width.name][unit]
    Masked.of(model, gates).masks = masks
    assert_same(model(ids()).logits, folded(ids()).logits)


@pytest.mark.parametrize("num_key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("kinds", [("heads", "channels"), ("heads", "channels", "hidden"), ALL], ids=len)
@torch.no_grad()
def test_a_masked_model_answers_as_the_sliced_one(wide, kinds, num_key_value_heads):
    model = wide(num_key_value_heads, bias=True)
    gates = Gates.of(model, kinds)
    masks = some_masks(gates)
    if "layers" in kinds:
        masks["model.layers"][1] = 0
    small = sliced(model, gates, masks)
    assert sum(p.numel() for p in small.parameters()) < 0.8 * sum(p.numel() for p in model.parameters())
    Masked.of(model, gates).masks = masks
    assert_same(model(ids()).logits, small(ids()).logits, 1e-4)


@torch.no_grad()
def test_a_norm_that_forgot_the_dimensions_that_went_would_be_seen(wide):
    model = wide()
    gates = Gates.of(model, ("channels", "hidden"))
    masks = some_masks(gates)
    small = sliced(model, gates, masks)
    for name, module in small.named_modules():
        if name.endswith("norm"):
            module.weight *= (int(masks["model.embed_tokens"].sum()) / 32) ** 0.5
    Masked.of(model, gates).masks = masks
    with pytest.raises(AssertionError):
        assert_same(model(ids()).logits, small(ids()).logits, 1e-2)


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@torch.no_grad()
def test_a_closed_layer_is_as_good_as_gone_whatever_biases_it_has(family):
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    gates = Gates.of(model, ("channels", "layers"))
    name = next(iter(gates.layers))
    masks = {name: torch.tensor([0.0, 1.0])}
    small = sliced(model, gates, masks)
    Masked.of(model, gates).masks = masks
    assert torch.equal(model(ids()).logits, small(ids()).logits)


@torch.no_grad()
def test_a_layer_in_between_mixes_what_it_is_given_with_what_it_makes(llama):
    model = llama(num_hidden_layers=1)
    gates = Gates.of(model, ("channels", "layers"))
    x = torch.randn(1, 5, 32)
    rotary = model.model.rotary_emb(x, torch.arange(5)[None])
    block = model.model.layers[0]
    dense = block(x, position_embeddings=rotary)
    Masked.of(model, gates).masks = {"model.layers": torch.tensor([0.25])}
    for call in (
        lambda: block(x, position_embeddings=rotary),
        lambda: block(hidden_states=x, position_embeddings=rotary),
    ):
        torch.testing.assert_close(call(), 0.75 * x + 0.25 * dense)


@torch.no_grad()
def test_masked_dimensions_are_zero_wherever_the_stream_is_seen(wide):
    model = wide(bias=True)
    gates = Gates.of(model, ALL)
    masks = some_masks(gates, binary=False)
    masks["model.layers"] = torch.tensor([1.0, 0.3, 0.0])
    Masked.of(model, gates).masks = masks
    closed = masks["model.embed_tokens"] == 0
    states = model(ids(), output_hidden_states=True).hidden_states
    assert len(states) == 4 and closed.any()
    for state in states:
        assert (state[..., closed] == 0).all() and (state[..., ~closed] != 0).any()


def lora(model, seed=0):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


@torch.no_grad()
def test_what_adapters_read_and_write_is_masked_too(wide):
    model = wide()
    gates = Gates.of(model, ALL)
    masks = some_masks(gates, binary=False)
    masks["model.layers"] = torch.tensor([1.0, 0.5, 0.0])
    adapted = lora(model)
    merged = copy.deepcopy(adapted).merge_and_unload()
    Masked.of(adapted, gates).masks = masks
    Masked.of(merged, gates).masks = masks
    assert_same(adapted(ids()).logits, merged(ids()).logits)
    with adapted.disable_adapter():
        plain = wide()
        Masked.of(plain, gates).masks = masks
        assert_same(adapted(ids()).logits, plain(ids()).logits)


def at(log_alpha, gates):
    """The gates, all with this log-alpha."""
    gates.log_alpha.data.fill_(log_alpha)
    return gates


def gradients(model, gates, dtype=None):
    """Gradients of log-alphas and of the adapters, for one draw."""
    gates.zero_grad()
    model.zero_grad()
    masked = Masked.of(model, gates)
    masked.masks = gates.sample(torch.Generator().manual_seed(4))
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        logits = model(ids(), use_cache=False).logits
    logits.float().log_softmax(-1)[..., 0].sum().backward()
    masked.remove()
    return [gates.log_alpha.grad.clone()] + [
        p.grad.clone() for n, p in model.named_parameters() if "lora" in n and p.grad is not None
    ]


def test_gradients_are_those_without_checkpointing(wide):
    model = lora(wide()).train()
    gates = at(1.0, Gates.of(wide(), ALL))
    plain = gradients(model, gates)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    checkpointed = gradients(model, gates)
    assert len(plain) == len(checkpointed) > 20 and model.model.model.layers[0].gradient_checkpointing
    for one, other in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert (plain[0] != 0).float().mean() > 0.3


@pytest.mark.parametrize("how", ["autocast", "bf16"])
def test_gradients_in_16_bits_point_where_those_in_32_do(wide, how):
    gates = at(1.0, Gates.of(wide(), ALL))
    exact = gradients(wide(), gates)[0]
    if how == "autocast":
        rough = gradients(wide(), gates, torch.bfloat16)[0]
    else:
        rough = gradients(wide(dtype=torch.bfloat16), gates)[0]
    assert rough.dtype == torch.float32 and rough.isfinite().all()
    assert float(torch.cosine_similarity(exact, rough, dim=0)) > 0.99


def test_one_draw_serves_all_micro_batches_of_a_step(wide):
    model = wide()
    gates = at(1.0, Gates.of(model, ALL))
    masked = Masked.of(model, gates)

    def loss(batch):
        return model(batch).logits.log_softmax(-1)[..., 0].sum()

    batches = ids().split(1)
    drawn = gates.sample(torch.Generator().manual_seed(4))
    masked.masks = drawn
    sum(loss(batch) for batch in batches).backward()
    whole, gates.log_alpha.grad = gates.log_alpha.grad, None

    drawn = gates.sample(torch.Generator().manual_seed(4))
    masked.masks = leaves = leaves_of(drawn)
    for batch in batches:
        loss(batch).backward()
    assert gates.log_alpha.grad is None
    pass_gradients_(drawn, leaves)
    torch.testing.assert_close(gates.log_alpha.grad, whole, rtol=1e-4, atol=1e-5)


def test_parts_that_never_ran_get_no_gradient(wide):
    gates = at(0.0, Gates.of(wide()))
    drawn = gates.sample(torch.Generator().manual_seed(0))
    leaves = leaves_of(drawn)
    leaves["model.layers.1.mlp.down_proj"].sum().backward()
    pass_gradients_(drawn, leaves)
    found = gates.split(gates.log_alpha.grad)
    assert [name for name in gates.names if found[name].any()] == ["model.layers.1.mlp.down_proj"]


def test_masks_that_do_not_fit_are_refused_and_change_nothing(llama):
    model = llama()
    masked = Masked.of(model, Gates.of(model))
    good = masked.masks = {"model.layers.0.mlp.down_proj": torch.zeros(63)}
    with pytest.raises(ValueError, match="unknown part with masks 'model.layers.0.mlp.up_proj'"):
        masked.masks = {"model.layers.0.mlp.up_proj": torch.zeros(63)}
    with pytest.raises(ValueError, match=r"the mask of model.layers.0.mlp.down_proj must be \[63\], got \(64,\)"):
        masked.masks = {"model.layers.0.mlp.down_proj": torch.zeros(64)}
    assert masked.masks is good


def test_a_model_with_masks_still_generates_as_the_sliced_one(wide):
    model = wide()
    gates = Gates.of(model, ("heads", "channels"))
    masks = some_masks(gates)
    small = sliced(model, gates, masks)
    Masked.of(model, gates).masks = masks
    prompt = token_samples(1, 4)[0][None]
    wanted = small.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for use_cache in (True, False):
        found = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0, use_cache=use_cache)
        assert torch.equal(found, wanted)
