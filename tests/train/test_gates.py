"""Gates against closed forms in float64, and the plans that they end as."""

import math

import pytest
import torch

from sparsekit.archs import Width
from sparsekit.errors import Unsupported
from sparsekit.train.gates import LIMIT, OPEN, Gates


def of_sizes(*sizes, initial=None, **options):
    """Gates on channels of these numbers, on no model; the log-alphas of the first are `initial`."""
    gates = Gates([Width(f"w{index}", "channels", size, 1, ()) for index, size in enumerate(sizes)], **options)
    if initial is not None:
        gates.split(gates.log_alpha.data)["w0"].copy_(torch.as_tensor(initial))
    return gates


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("alpha", [-4.6, -1.0, 0.0, 1.0, 4.6])
def test_a_million_draws_have_the_closed_forms_chances(alpha):
    gates = of_sizes(1_000_000, initial=alpha)
    drawn = gates.sample(torch.Generator().manual_seed(0))["w0"].detach()
    assert drawn.min() >= 0 and drawn.max() <= 1 and drawn.dtype == torch.float32
    shift = 2 / 3 * math.log(0.1 / 1.1)
    assert float((drawn > 0).double().mean()) == pytest.approx(sigmoid(alpha - shift), abs=2e-3)
    assert float((drawn == 1).double().mean()) == pytest.approx(sigmoid(alpha + shift), abs=2e-3)
    assert gates.p_open()["w0"][0].item() == pytest.approx(sigmoid(alpha - shift), rel=1e-5)


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_chance_to_be_open_has_the_slope_of_finite_differences(stochastic):
    gates = of_sizes(7, stochastic=stochastic, initial=torch.linspace(-4.5, 4.5, 7))
    gates.p_open()["w0"].sum().backward()
    alpha = torch.linspace(-4.5, 4.5, 7).double()
    slope = (gates.chance(alpha + 1e-5) - gates.chance(alpha - 1e-5)) / 2e-5
    torch.testing.assert_close(gates.log_alpha.grad.double(), slope, rtol=1e-4, atol=1e-6)


def test_a_draw_and_its_gradient_are_those_of_the_formula_in_float64():
    gates = of_sizes(500, 3, initial=torch.linspace(-4, 4, 500))
    drawn = gates.sample(torch.Generator().manual_seed(3))
    sum(each.sum() for each in drawn.values()).backward()
    u = torch.rand(503, generator=torch.Generator().manual_seed(3)).double() * (1 - 2e-6) + 1e-6
    alpha = gates.log_alpha.detach().double()
    v = 1 / (1 + torch.exp(-(u.log() - (1 - u).log() + alpha) * 1.5))
    stretched = v * 1.2 - 0.1
    torch.testing.assert_close(torch.cat(list(drawn.values())).double(), stretched.clamp(0, 1), rtol=0, atol=1e-5)
    slope = torch.where((stretched > 0) & (stretched < 1), 1.2 * v * (1 - v) * 1.5, torch.zeros(()).double())
    torch.testing.assert_close(gates.log_alpha.grad.double(), slope, rtol=1e-3, atol=1e-5)
    assert (slope > 0).any() and (slope == 0).any()


def test_a_generator_decides_the_draw_and_nobody_elses_is_touched():
    gates = of_sizes(50, initial=0.0)
    before = torch.get_rng_state()
    one, same, other = (gates.sample(torch.Generator().manual_seed(seed))["w0"] for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(5)
    drawn = gates.sample()["w0"]
    torch.manual_seed(5)
    assert torch.equal(drawn, gates.sample()["w0"]) and not torch.equal(drawn, gates.sample()["w0"])


def test_gates_that_are_not_stochastic_draw_nothing_and_learn_where_they_are_clipped():
    gates = of_sizes(5, stochastic=False, initial=torch.tensor([-4.0, -1.5, 0.0, 1.5, 4.0]))
    before = torch.get_rng_state()
    soft = gates.sample()["w0"]
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(soft, gates.sample()["w0"])
    wanted = [min(max(1.2 * sigmoid(1.5 * alpha) - 0.1, 0), 1) for alpha in (-4.0, -1.5, 0.0, 1.5, 4.0)]
    assert soft.tolist() == pytest.approx(wanted, abs=1e-6) and soft[0] == 0 and soft[-1] == 1
    assert gates.p_open()["w0"].tolist() == pytest.approx([sigmoid(1.5 * a) for a in (-4.0, -1.5, 0.0, 1.5, 4.0)])
    soft.sum().backward()
    v = torch.sigmoid(1.5 * gates.log_alpha.detach())
    torch.testing.assert_close(gates.log_alpha.grad, 1.2 * v * (1 - v) * 1.5)


@pytest.mark.parametrize("stochastic", [True, False])
def test_the_papers_masks_close_as_many_as_are_expected_to_be(stochastic):
    torch.manual_seed(0)
    gates = of_sizes(1, 2, 17, 63, stochastic=stochastic)
    gates.log_alpha.data.uniform_(-LIMIT, LIMIT)
    for (name, mask), p_open in zip(gates.paper_masks().items(), gates.p_open().values(), strict=True):
        alpha = gates.split(gates.log_alpha.detach())[name]
        assert int((mask == 0).sum()) == round(len(mask) - float(p_open.double().sum()))
        kept = mask > 0
        assert not kept.any() or kept.all() or alpha[kept].min() >= alpha[~kept].max()
        torch.testing.assert_close(mask[kept], torch.sigmoid(1.2 * alpha[kept]))
        assert not mask.requires_grad
    gates.log_alpha.data.fill_(LIMIT)
    assert float(gates.paper_masks()["w2"][0]) == pytest.approx(0.99603, abs=1e-5)


def test_limits_hold_log_alphas_and_a_shadow_remembers_what_they_cut_off():
    gates = of_sizes(3, initial=10.0)
    gates.clamp_()
    gates.excess.zero_()
    assert gates.log_alpha.tolist() == pytest.approx([math.log(100)] * 3)
    free = gates.log_alpha.detach().clone()
    for step in ([1.0, -2.0, 0.5], [1.0, -9.0, 0.0], [2.0, -1.0, 0.0]):
        gates.log_alpha.data += torch.tensor(step)
        gates.clamp_()
        free += torch.tensor(step)
        assert gates.log_alpha.abs().max() <= LIMIT
    torch.testing.assert_close(gates.shadow()["w0"], free)
    assert gates.log_alpha[0] == gates.log_alpha[2] and gates.shadow()["w0"][0] > gates.shadow()["w0"][2]


def test_gates_stay_in_fp32_and_travel_in_a_state_dict():
    gates = of_sizes(9, initial=torch.linspace(-1, 1, 9))
    gates.excess += torch.arange(9.0)
    exact = gates.log_alpha.detach().clone()
    assert gates.bfloat16().log_alpha.dtype == gates.half().excess.dtype == torch.float32
    assert torch.equal(gates.log_alpha, exact)
    other = of_sizes(9)
    other.load_state_dict(gates.state_dict())
    assert torch.equal(other.shadow()["w0"], gates.shadow()["w0"])


def test_gates_of_a_model_begin_open(llama):
    gates = Gates.of(llama(), ("heads", "channels", "hidden", "layers"))
    assert gates.sizes == {
        "model.layers.0.self_attn.o_proj": 2,
        "model.layers.0.mlp.down_proj": 63,
        "model.layers.1.self_attn.o_proj": 2,
        "model.layers.1.mlp.down_proj": 63,
        "model.embed_tokens": 32,
        "model.layers": 2,
    }
    assert list(gates.kinds.values()) == ["heads", "channels"] * 2 + ["hidden", "layers"]
    assert torch.equal(gates.log_alpha.detach(), torch.full((164,), OPEN)) and gates.names == list(gates.sizes)
    assert [width.kind for width in Gates.of(llama(), ("channels",)).widths] == ["channels"] * 2


def test_arguments_that_do_not_fit_are_refused(llama, gpt2):
    with pytest.raises(ValueError, match="unknown kind of units 'neurons'"):
        Gates.of(llama(), ("heads", "neurons"))
    with pytest.raises(ValueError, match="leaves no heads and no channels"):
        Gates.of(llama(), ("hidden",))
    with pytest.raises(Unsupported, match="hidden dimensions of GPT2LMHeadModel cannot be cut"):
        Gates.of(gpt2(), ("heads", "hidden"))


def test_masks_become_cuts_under_the_names_that_layers_have_afterwards(llama):
    gates = Gates.of(llama(num_hidden_layers=3), ("heads", "channels", "hidden", "layers"))
    masks = {name: torch.ones(size, dtype=torch.bool) for name, size in gates.sizes.items()}
    assert gates.cuts(masks) == {}
    masks["model.layers"][0] = False
    masks["model.layers.0.mlp.down_proj"][:] = False
    masks["model.layers.2.mlp.down_proj"][[0, 62]] = False
    masks["model.layers.1.self_attn.o_proj"][1] = False
    masks["model.embed_tokens"][5:] = False
    cuts = gates.cuts({name: mask.float() * 0.3 for name, mask in masks.items()})
    assert next(iter(cuts)) == "model.layers" and set(cuts) == {
        "model.layers",
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.embed_tokens",
    }
    assert cuts["model.layers"].kept.tolist() == [1, 2] and cuts["model.layers"].kind == "layers"
    assert cuts["model.layers.1.mlp.down_proj"].kept.tolist() == list(range(1, 62))
    assert cuts["model.embed_tokens"].num == 32 and cuts["model.embed_tokens"].kind == "hidden"
    masks["model.layers.1.mlp.down_proj"][:] = False
    with pytest.raises(ValueError, match="nothing is left of 63 channels"):
        gates.cuts(masks)
