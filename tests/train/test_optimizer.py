"""The optimizer against float64 written from the definition of its three variants, and its rules one by one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsekit.errors import PatternError
from sparsekit.patterns import NM
from sparsekit.train.optimizer import MASKED_DECAY_KINDS, MaskedAdamW

KINDS = list(MASKED_DECAY_KINDS)
DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(5, 8), (3, 63), (4, 172), (1, 1), (7, 61), (0, 8)]


def matrix(N, K, seed=0, dtype=torch.float32):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


def with_ties(N, K, dtype=torch.float32):
    """Few distinct values, so that groups hold ties and zeros, and some hold nothing else."""
    w = torch.randint(-1, 2, (N, K), generator=torch.Generator().manual_seed(1)).to(dtype) / 2
    w[:, : min(K, 4)] = 0
    return w


def optimizer_for(*parameters, transposed=False, pattern="2:4", cls=MaskedAdamW, **options):
    group = {
        "params": list(parameters),
        "names": [f"layer{index}" for index in range(len(parameters))],
        "transposed": [transposed] * len(parameters),
        "masked": True,
    }
    n, m = map(int, pattern.split(":"))
    return cls([group], pattern=NM(n, m), **options)


def dense_of(optimizer, parameter, transposed=False):
    dense = optimizer.state[parameter]["dense"]
    return (dense.T if transposed else dense).clone()


def brute_mask(scores, n, m):
    """Group after group: the n largest, ties to the lower index."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            columns = range(start, min(start + m, scores.shape[1]))
            for column in sorted(columns, key=lambda k: (-scores[row, k].item(), k))[:n]:
                keep[row, column] = True
    return keep


def assert_legal(keep, n=2, m=4):
    """Every group keeps n, the last one of a row as many as it has, up to n."""
    assert keep.dtype == torch.bool
    for start in range(0, keep.shape[1], m):
        group = keep[:, start : start + m]
        assert (group.sum(1) == min(n, group.shape[1])).all()


class Reference:
    """One weight [N, K] in float64, as the method's description has it."""

    def __init__(self, w, kind, n=2, m=4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, hysteresis=0.0):
        self.W, self.kind, self.n, self.m = w.double().clone(), kind, n, m
        self.betas, self.eps, self.weight_decay, self.hysteresis = betas, eps, weight_decay, hysteresis
        self.M, self.V, self.t = torch.zeros_like(self.W), torch.zeros_like(self.W), 0
        self.keep = brute_mask(self.W.abs(), n, m)

    def step(self, g, lr, strength):
        b1, b2 = self.betas
        self.t += 1
        if self.kind == "gradient":
            g = g + strength * torch.where(self.keep, 0.0, self.W)
        self.W = self.W * (1 - lr * self.weight_decay)
        removed = torch.where(self.keep, 0.0, self.W)
        self.M = b1 * self.M + (1 - b1) * g
        corrected = self.M / (1 - b1**self.t)
        if self.kind == "paper":
            corrected = corrected + strength * removed
            self.V = b2 * self.V + (1 - b2) * corrected**2
        else:
            self.V = b2 * self.V + (1 - b2) * g**2
        self.W = self.W - lr * corrected / ((self.V / (1 - b2**self.t)).sqrt() + self.eps)
        if self.kind == "decoupled":
            self.W = torch.where(self.keep, self.W, self.W * (1 - lr * strength))

    def refresh(self):
        bonus = torch.where(self.keep, 1 + self.hysteresis, 1.0)
        self.keep = brute_mask(self.W.abs() * bonus, self.n, self.m)


def schedule(step):
    """(learning rate, lambda) of a step: both rise, as in training."""
    return 0.02 * min((step + 1) / 4, 1), 0.8 * min(step / 6, 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N,K,pattern", [(5, 8, "2:4"), (3, 63, "2:4"), (4, 172, "1:4"), (2, 19, "4:8")])
def test_a_run_is_that_of_the_definition(N, K, pattern, kind, dtype, transposed):
    """Gradients are random, dense: those of removed entries count as much as others."""
    n, m = map(int, pattern.split(":"))
    w = (matrix(N, K) / 8).to(dtype)
    parameter = nn.Parameter((w.T if transposed else w).clone())
    options = {"weight_decay": 0.1, "hysteresis": 0.05}
    optimizer = optimizer_for(parameter, transposed=transposed, pattern=pattern, masked_decay_kind=kind, **options)
    reference = Reference(w, kind, n, m, **options)
    optimizer.mask_()
    for step in range(14):
        lr, optimizer.masked_decay = schedule(step)
        optimizer.param_groups[0]["lr"] = lr
        g = matrix(N, K, seed=100 + step, dtype=dtype)
        parameter.grad = (g.T if transposed else g).contiguous()
        optimizer.step()
        reference.step(g.double(), lr, optimizer.masked_decay)
        if step % 3 == 2:
            optimizer.refresh_masks_()
            reference.refresh()
        dense = dense_of(optimizer, parameter, transposed)
        torch.testing.assert_close(dense.double(), reference.W, rtol=1e-4, atol=2e-6)
        assert torch.equal(optimizer.keep()["layer0"], reference.keep)
        held = parameter.detach().T if transposed else parameter.detach()
        assert torch.equal(held, (dense * reference.keep).to(dtype))
    assert (reference.keep != brute_mask(w.double().abs(), n, m)).any()  # masks did move


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(23, 16), nn.Linear(16, 5, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.second(torch.tanh(self.norm(self.first(x))))


@pytest.mark.parametrize("kind", KINDS)
def test_training_a_network_is_that_of_the_definition(kind):
    """Forward with W * m, straight-through gradient to all of W, whole runs, in float64 beside it."""
    torch.manual_seed(0)
    net = Net()
    reference_net = copy.deepcopy(net).double()
    masked = [net.first.weight, net.second.weight]
    plain = [net.first.bias, net.norm.weight, net.norm.bias]
    optimizer = MaskedAdamW(
        [
            {"params": masked, "names": ["first", "second"], "transposed": [False] * 2, "masked": True},
            {"params": plain, "weight_decay": 0.0},
        ],
        pattern=NM(2, 4),
        weight_decay=0.1,
        masked_decay_kind=kind,
        hysteresis=0.05,
    )
    references = [Reference(w.detach(), kind, weight_decay=0.1, hysteresis=0.05) for w in masked]
    reference_plain = [reference_net.first.bias, reference_net.norm.weight, reference_net.norm.bias]
    reference_adam = torch.optim.AdamW(reference_plain, betas=(0.9, 0.95), weight_decay=0.0)
    optimizer.mask_()
    for step in range(20):
        x, y = matrix(32, 23, seed=step), matrix(32, 5, seed=1000 + step)
        lr, optimizer.masked_decay = schedule(step)
        for group in (*optimizer.param_groups, *reference_adam.param_groups):
            group["lr"] = lr
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()

        for layer, reference in zip((reference_net.first, reference_net.second), references, strict=True):
            layer.weight = nn.Parameter(torch.where(reference.keep, reference.W, 0.0))
        reference_adam.zero_grad()
        F.mse_loss(reference_net(x.double()), y.double()).backward()
        for layer, reference in zip((reference_net.first, reference_net.second), references, strict=True):
            reference.step(layer.weight.grad, lr, optimizer.masked_decay)
        reference_adam.step()
        if step % 4 == 3:
            optimizer.refresh_masks_()
            for reference in references:
                reference.refresh()
        for name, parameter, reference in zip(("first", "second"), masked, references, strict=True):
            assert torch.equal(optimizer.keep()[name], reference.keep)
            torch.testing.assert_close(dense_of(optimizer, parameter).double(), reference.W, rtol=1e-3, atol=1e-3)
        for parameter, expected in zip(plain, reference_plain, strict=True):
            torch.testing.assert_close(parameter.double(), expected, rtol=1e-3, atol=1e-3)


def test_the_forward_sees_the_masked_weight_bit_for_bit():
    torch.manual_seed(0)
    linear = nn.Linear(63, 5)
    dense = linear.weight.detach().clone()
    optimizer = optimizer_for(linear.weight)
    optimizer.mask_()
    keep = optimizer.keep()["layer0"]
    x = matrix(4, 63)
    assert torch.equal(linear(x), F.linear(x, dense * keep, linear.bias))
    assert torch.equal(dense_of(optimizer, linear.weight), dense)
    linear(x).square().sum().backward()
    leaf = (dense * keep).requires_grad_()
    F.linear(x, leaf, linear.bias).square().sum().backward()
    assert torch.equal(linear.weight.grad, leaf.grad) and (linear.weight.grad[~keep] != 0).all()


@pytest.mark.parametrize("kind", ["decoupled", "gradient"])
def test_without_masked_decay_it_is_adamw_with_a_straight_through_gradient(kind):
    parameter = nn.Parameter(matrix(5, 63))
    optimizer = optimizer_for(parameter, masked_decay_kind=kind, lr=0.01, weight_decay=0.1)
    dense = nn.Parameter(parameter.detach().clone())
    plain = torch.optim.AdamW([dense], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    optimizer.mask_()
    for step in range(6):
        x = matrix(9, 63, seed=step)
        optimizer.zero_grad()
        F.linear(x, parameter).square().mean().backward()
        dense.grad = parameter.grad.clone()
        optimizer.step()
        plain.step()
        assert torch.equal(dense_of(optimizer, parameter), dense.detach())
        optimizer.refresh_masks_()
        assert torch.equal(parameter.detach(), dense.detach() * NM(2, 4).project(dense.detach().abs()))


# --- bugs of the published code -------------------------------------------------------------------------------------


class IntegerMasks(MaskedAdamW):
    """The published bug: `~` of an integer mask is -1 where removed and -2 where kept."""

    def _removed(self, parameter):
        state = self.state[parameter]
        keep = (state["flags"] & 1).to(torch.int32)
        return state["dense"] * ~keep


def decays_as_it_should(kind, cls=MaskedAdamW):
    """With a zero gradient: removed weights shrink, every one, and kept ones stay as they are, bit for bit."""
    w = matrix(6, 64).sign() * (0.2 + matrix(6, 64).abs())
    parameter = nn.Parameter(w.clone())
    optimizer = optimizer_for(parameter, masked_decay_kind=kind, lr=1e-3, cls=cls)
    optimizer.mask_()
    keep = optimizer.keep()["layer0"]
    optimizer.masked_decay = 0.5
    for _ in range(3):
        before = dense_of(optimizer, parameter)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        after = dense_of(optimizer, parameter)
        if not torch.equal(after[keep], before[keep]) or not (after[~keep].abs() < before[~keep].abs()).all():
            return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_only_removed_weights_decay(kind):
    assert decays_as_it_should(kind)
    assert not decays_as_it_should(kind, IntegerMasks)


class DoublyCorrected(MaskedAdamW):
    """The published bug: the bias of M is corrected outside of what already divides by the size of M."""

    def _adam_of_the_paper(self, group, parameter, weight, gradient, strength):
        state, (beta1, beta2) = self._moments(parameter), group["betas"]
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        update = state["exp_avg"] + strength * self._removed(parameter)
        state["exp_avg_sq"].mul_(beta2).addcmul_(update, update, value=1 - beta2)
        size = (state["exp_avg_sq"] / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        weight.sub_(group["lr"] / (1 - beta1 ** state["step"]) * update / size)


def first_move(kind, cls=MaskedAdamW, lr=0.01):
    """The largest change of the first step, in units of the learning rate."""
    parameter = nn.Parameter(matrix(6, 63))
    optimizer = optimizer_for(parameter, masked_decay_kind=kind, lr=lr, cls=cls)
    optimizer.mask_()
    before = dense_of(optimizer, parameter)
    parameter.grad = matrix(6, 63, seed=1) * torch.logspace(-3, 3, 63)
    optimizer.step()
    return ((dense_of(optimizer, parameter) - before).abs().max() / lr).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_goes_no_further_than_the_learning_rate(kind):
    assert first_move(kind) <= 1.01
    assert first_move("paper", DoublyCorrected) > 9


@pytest.mark.parametrize("kind", KINDS)
def test_masked_decay_leaves_momentum_only_in_the_gradient_form(kind):
    parameter = nn.Parameter(matrix(6, 64))
    optimizer = optimizer_for(parameter, masked_decay_kind=kind, lr=1e-3)
    optimizer.mask_()
    for optimizer.masked_decay in (0.5, 0.0):
        before = dense_of(optimizer, parameter)
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    has_momentum = kind == "gradient"
    assert bool(optimizer.state[parameter]["exp_avg"].any()) == has_momentum
    assert torch.equal(dense_of(optimizer, parameter), before) != has_momentum


# --- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("make", [matrix, with_ties])
@pytest.mark.parametrize("N,K", SHAPES)
def test_every_group_keeps_two(N, K, make, dtype, transposed):
    w = make(N, K, dtype=dtype)
    parameter = nn.Parameter((w.T if transposed else w).clone())
    optimizer = optimizer_for(parameter, transposed=transposed, lr=0.05)
    optimizer.mask_()
    assert torch.equal(optimizer.keep()["layer0"], brute_mask(w.double().abs(), 2, 4))
    optimizer.masked_decay = 0.5
    for step in range(6):
        g = matrix(N, K, seed=step, dtype=dtype)
        parameter.grad = (g.T if transposed else g).clone()
        optimizer.step()
        optimizer.refresh_masks_()
        keep = optimizer.keep()["layer0"]
        assert_legal(keep)
        held = parameter.detach().T if transposed else parameter.detach()
        assert not held[~keep].any()
        assert keep.is_contiguous() and keep.shape == (N, K)


def test_masks_run_along_in_features_whichever_way_a_weight_is_stored():
    w = matrix(12, 20)
    masks = []
    for transposed in (False, True):
        parameter = nn.Parameter((w.T if transposed else w).contiguous())
        optimizer = optimizer_for(parameter, transposed=transposed)
        optimizer.mask_()
        masks.append(optimizer.keep()["layer0"])
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], brute_mask(w.abs(), 2, 4)) and not torch.equal(masks[0], brute_mask(w.T.abs(), 2, 4).T)


def test_a_parameter_that_is_not_contiguous():
    w, g = matrix(6, 64), matrix(6, 64, seed=1)
    results = []
    for held in (w.clone(), w.T.contiguous().T):
        parameter = nn.Parameter(held)
        optimizer = optimizer_for(parameter, lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            (parameter * g).sum().backward()
            optimizer.step()
            optimizer.refresh_masks_()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


def test_masks_are_chosen_by_the_float32_weights():
    """In bf16 the first three would tie, and the mask would go by position."""
    parameter = nn.Parameter(torch.tensor([[1.0, 1.0, 1.0, 0.5]], dtype=torch.bfloat16))
    optimizer = optimizer_for(parameter)
    optimizer.mask_()
    optimizer.state[parameter]["dense"] = torch.tensor([[1.0, 1.0001, 1.0002, 0.5]])
    optimizer.refresh_masks_()
    assert optimizer.keep()["layer0"].tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_raises(bad):
    w = matrix(3, 8)
    w[1, 5] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        optimizer_for(nn.Parameter(w)).mask_()
    parameter = nn.Parameter(matrix(3, 8))
    optimizer = optimizer_for(parameter, lr=0.1)
    optimizer.mask_()
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[2, 3] = bad
    optimizer.step()
    with pytest.raises(ValueError, match="NaN"):
        optimizer.refresh_masks_()


def test_first_masks_can_be_given_and_must_obey_the_pattern():
    w = matrix(5, 63)
    keep = brute_mask(-w.abs(), 2, 4)
    parameter = nn.Parameter(w.clone())
    optimizer = optimizer_for(parameter, keep={"layer0": keep})
    optimizer.mask_()
    assert torch.equal(optimizer.keep()["layer0"], keep) and torch.equal(parameter.detach(), w * keep)
    with pytest.raises(PatternError, match=r"layer0 breaks 2:4 in 5 groups.*start from"):
        keep[:, :3] = True
        optimizer_for(nn.Parameter(w.clone()), keep={"layer0": keep}).mask_()


def test_hysteresis_keeps_what_is_only_just_smaller():
    parameter = nn.Parameter(torch.tensor([[1.0, 0.8, 0.7, 0.1]]))
    optimizer = optimizer_for(parameter, hysteresis=0.05)
    optimizer.mask_()
    for challenger, kept in ((0.83, [True, True, False, False]), (0.85, [True, False, True, False])):
        optimizer.state[parameter]["dense"][0, 2] = challenger
        optimizer.refresh_masks_()
        assert optimizer.keep()["layer0"].tolist() == [kept]
    optimizer.state[parameter]["dense"][0, 1] = 0.88  # it must exceed in its turn
    assert optimizer.refresh_masks_().flip_rate == 0


def test_statistics_count_what_flips():
    """Against brute force over the masks before and after; what comes back is as much as what goes."""
    parameters = [nn.Parameter(matrix(6, 63)), nn.Parameter(matrix(16, 20, seed=1))]
    optimizer = optimizer_for(*parameters, lr=0.2)
    optimizer.mask_()
    first = {name: keep.clone() for name, keep in optimizer.keep().items()}
    entries = sum(parameter.numel() for parameter in parameters)
    for step in range(4):
        for index, parameter in enumerate(parameters):
            parameter.grad = matrix(*parameter.shape, seed=10 * step + index)
        optimizer.masked_decay = 0.3
        optimizer.step()
        before = optimizer.keep()
        found = optimizer.refresh_masks_()
        after = optimizer.keep()
        flips = sum(int((after[name] != before[name]).sum()) for name in after)
        revived = sum(int((after[name] & ~first[name]).sum()) for name in after)
        removed = sum(int((~after[name] & first[name]).sum()) for name in after)
        assert flips > 0 and revived == removed == found.revived
        assert found.flip_rate == pytest.approx(flips / entries, abs=1e-12)
        assert found.initial_flip_rate == pytest.approx(2 * revived / entries, abs=1e-12)
        dense = [dense_of(optimizer, parameter).double() for parameter in parameters]
        lost = sum(float(w[~keep].square().sum()) for w, keep in zip(dense, after.values(), strict=True))
        assert found.masked_energy == pytest.approx(lost / sum(float(w.square().sum()) for w in dense), rel=1e-6)
    assert optimizer.refresh_masks_().flip_rate == 0


# --- the rest -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gradient", "paper"])
def test_masked_decay_can_follow_the_gradients(kind):
    """lambda = follow * rms(M) / rms(W): the pull is to the gradients as everywhere else."""
    small, large = nn.Parameter(matrix(8, 64) * 1e-2), nn.Parameter(matrix(8, 64, seed=1) * 10)
    optimizer = optimizer_for(small, large, masked_decay_kind=kind, lr=1e-6)
    optimizer.masked_decay, optimizer.follow = None, 0.3
    optimizer.mask_()
    assert optimizer._lambda(small) == 0  # no gradient was seen yet
    for parameter, size in ((small, 1e-3), (large, 50.0)):
        parameter.grad = matrix(8, 64, seed=2) * size
    optimizer.step()
    for parameter in (small, large):
        state = optimizer.state[parameter]
        expected = 0.3 * state["exp_avg"].square().mean().sqrt() / state["dense"].square().mean().sqrt()
        assert optimizer._lambda(parameter) == pytest.approx(float(expected), rel=1e-5)
    assert optimizer._lambda(large) != pytest.approx(optimizer._lambda(small), rel=0.5)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_rewrite_changes_what_the_forward_sees_and_not_what_is_trained(transposed):
    seen = []

    def to_tenths(name, kept_NK, keep_NK, branch):
        seen.append((name, tuple(kept_NK.shape), keep_NK.dtype))
        assert not kept_NK[~keep_NK].any() and not branch
        return (kept_NK * 10).round() / 10, {}

    w = matrix(6, 20)
    parameter = nn.Parameter((w.T if transposed else w).clone())
    optimizer = optimizer_for(parameter, transposed=transposed, lr=0.05, rewrite=to_tenths)
    for step in range(3):
        parameter.grad = matrix(*parameter.shape, seed=step)
        optimizer.step()
    dense, keep = dense_of(optimizer, parameter, transposed), optimizer.keep()["layer0"]
    held = parameter.detach().T if transposed else parameter.detach()
    assert torch.equal(held, (dense * keep * 10).round() / 10) and not torch.equal(held, dense * keep)
    assert set(seen) == {("layer0", (6, 20), torch.bool)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rewrite_sees_the_branch_beside_a_weight_once_both_have_stepped(dtype):
    """S learns in fp32 whatever is written; what others write counts until `rewrite` is there, and not from then on."""
    parameters = [nn.Parameter(matrix(6, 20, seed=seed, dtype=dtype)) for seed in range(2)]
    S = nn.Parameter(matrix(6, 2, seed=5, dtype=dtype))
    groups = [
        {"params": [S], "branch": ["b.side_S"]},
        {"params": parameters, "names": ["a", "b"], "transposed": [False] * 2, "masked": True},
    ]
    optimizer = MaskedAdamW(groups, pattern=NM(2, 4), lr=0.05)
    expected = torch.optim.AdamW(
        [nn.Parameter(S.detach().float().clone())], lr=0.05, betas=(0.9, 0.95), weight_decay=0.0
    )
    reference = expected.param_groups[0]["params"][0]
    seen = []

    def to_tenths(name, kept_NK, keep_NK, branch):
        S = branch.get("side_S")
        seen.append((name, None if S is None else S.clone(), optimizer.state[parameters[1]]["step"].item()))
        return (kept_NK * 10).round() / 10, {} if S is None else {"side_S": (S * 10).round() / 10}

    for step in range(4):
        for seed, parameter in enumerate((*parameters, S)):
            parameter.grad = matrix(*parameter.shape, seed=10 * step + seed, dtype=dtype)
        reference.grad = S.grad.float()
        if step == 2:
            optimizer.rewrite = to_tenths
            optimizer.write_()
            assert [(name, S is None) for name, S, _ in seen] == [("a", True), ("b", False)]
        seen.clear()
        optimizer.step()
        expected.step()
    assert torch.allclose(seen[1][1], reference, rtol=1e-5, atol=1e-6) and seen[1][2] == 4
    assert torch.equal(S.detach(), (seen[1][1] * 10).round().div(10).to(dtype))
    assert torch.equal(optimizer.state[S]["dense"], seen[1][1]) and not torch.equal(S.detach().float(), seen[1][1])


def test_plain_parameters_of_16_bits_learn_what_is_smaller_than_their_last_bit():
    """A norm's weight is 1, its last bit 2^-7; a step of 1e-4 is lost without float32 beside it."""
    parameter = nn.Parameter(torch.ones(33, dtype=torch.bfloat16))
    reference = nn.Parameter(torch.ones(33))
    optimizer = MaskedAdamW([{"params": [parameter]}], pattern=NM(2, 4), lr=1e-3)
    expected = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for step in range(20):
        parameter.grad = matrix(1, 33, seed=step % 3)[0].bfloat16()
        reference.grad = parameter.grad.float()
        optimizer.step()
        expected.step()
        assert torch.equal(parameter.detach(), reference.detach().bfloat16())
    assert (parameter != 1).any()
    with torch.no_grad():
        parameter[3] = 5.0  # written by someone else, as a refit of a branch does
    parameter.grad.zero_()
    before = optimizer.state[parameter]["dense"].clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    dense = optimizer.state[parameter]["dense"]
    assert parameter[3] == 5.0 and dense[3] == 5.0 and torch.equal(dense[4:], before[4:])


def test_a_parameter_without_gradient_stays():
    parameters = [nn.Parameter(matrix(3, 8)), nn.Parameter(matrix(3, 8, seed=1)), nn.Parameter(torch.ones(2))]
    group = {"params": parameters[:2], "names": ["a", "b"], "transposed": [False] * 2, "masked": True}
    optimizer = MaskedAdamW([group, {"params": parameters[2:]}], pattern=NM(2, 4), lr=0.1)
    optimizer.mask_()
    before = dense_of(optimizer, parameters[1])
    optimizer.masked_decay = 0.5
    parameters[0].grad = matrix(3, 8, seed=2)
    optimizer.step()
    assert torch.equal(dense_of(optimizer, parameters[1]), before) and (parameters[2] == 1).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_state_dict_takes_a_run_up_where_it_was(dtype, kind, tmp_path):
    """Bit for bit, through a file, with float32 state beside bf16 weights and masks that the weights do not show."""

    def begin():
        parameter, plain = nn.Parameter(matrix(5, 63, dtype=dtype)), nn.Parameter(torch.ones(7, dtype=dtype))
        group = {"params": [parameter], "names": ["a"], "transposed": [False], "masked": True}
        options = {"pattern": NM(2, 4), "lr": 0.05, "hysteresis": 0.3, "masked_decay_kind": kind}
        return parameter, plain, MaskedAdamW([group, {"params": [plain]}], **options)

    def train(parameter, plain, optimizer, steps):
        optimizer.masked_decay = 0.3
        for step in steps:
            parameter.grad, plain.grad = matrix(5, 63, seed=step, dtype=dtype), matrix(1, 7, seed=step, dtype=dtype)[0]
            optimizer.step()
            if step % 4 == 1:
                optimizer.refresh_masks_()

    parameter, plain, optimizer = begin()
    train(parameter, plain, optimizer, range(6))
    saved = {"parameter": parameter.detach(), "plain": plain.detach(), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "saved.pt")
    train(parameter, plain, optimizer, range(6, 12))

    resumed, plain_resumed, other = begin()
    saved = torch.load(tmp_path / "saved.pt", weights_only=True)
    with torch.no_grad():
        resumed.copy_(saved["parameter"])
        plain_resumed.copy_(saved["plain"])
    other.load_state_dict(saved["optimizer"])
    other.mask_()
    for key, value in saved["optimizer"]["state"][0].items():
        assert other.state[resumed][key].dtype == value.dtype
    train(resumed, plain_resumed, other, range(6, 12))
    assert torch.equal(parameter, resumed) and torch.equal(plain, plain_resumed)
    for one, two in ((parameter, resumed), (plain, plain_resumed)):
        assert optimizer.state[one].keys() == other.state[two].keys()
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, other.state[two][key]), key
    assert optimizer.refresh_masks_() == other.refresh_masks_()


def test_a_closure_and_bad_arguments():
    parameter = nn.Parameter(matrix(3, 8))
    optimizer = optimizer_for(parameter, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameter.square().sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) > optimizer.step(closure)
    with pytest.raises(ValueError, match="masked_decay_kind='adam'.*decoupled, gradient, paper"):
        optimizer_for(parameter, masked_decay_kind="adam")
    with pytest.raises(ValueError, match="names and transposed"):
        MaskedAdamW([{"params": [parameter], "names": [], "transposed": [], "masked": True}], pattern=NM(2, 4))
