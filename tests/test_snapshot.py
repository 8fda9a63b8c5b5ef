"""The copy that makes calls all or nothing."""

import contextlib
import copy

import pytest
import torch
import torch.nn as nn

import sparsekit as sk
from sparsekit.nn import SideLinear, install_side_, sparse_layers
from sparsekit.plan import SideBranch
from sparsekit.snapshot import put_back_afterwards, restored_on_failure


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32, bias=False)).to(dtype)


def same(model, before):
    state = model.state_dict()
    return state.keys() == before.keys() and all(
        torch.equal(state[key].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
        for key, tensor in before.items()
    )


def state_of(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_restores_what_was_remembered(error, dtype):
    model = mlp(dtype)
    model[0].weight.data[0, :3] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 2, torch.inf])
    before, weight = state_of(model), model[0].weight
    with pytest.raises(error), restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        model[0].weight.data.zero_()
        snapshot.remember("0")  # the first call counts
        raise error
    assert same(model, before) and model[0].weight is weight, "in place, so that optimizers still see it"


def test_keeps_what_succeeded():
    model = mlp()
    with restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        model[0].weight.data.zero_()
    assert not model[0].weight.any()


def test_leaves_alone_what_was_not_remembered():
    model = mlp()
    with pytest.raises(KeyError), restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        model[2].weight.data.zero_()
        raise KeyError
    assert model[0].weight.any() and not model[2].weight.any()


def test_layers_packed_since_are_dense_again():
    model = mlp()
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), restored_on_failure(model) as snapshot:
        for name in ("0", "2"):
            snapshot.remember(name)
        sk.prune_(model, "magnitude", progress=False)
        sk.pack_(model)
        raise KeyboardInterrupt
    assert not sparse_layers(model) and same(model, before)


def test_layers_packed_before_stay_packed():
    model = mlp()
    sk.prune_(model, "magnitude", targets="0", progress=False)
    sk.pack_(model)
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), restored_on_failure(model):
        sk.prune_(model, "magnitude", progress=False)
        sk.pack_(model)
        assert len(sparse_layers(model)) == 2
        raise KeyboardInterrupt
    assert list(sparse_layers(model)) == ["0"] and same(model, before)


def test_the_outer_block_restores_for_the_inner():
    model = mlp()
    before = state_of(model)
    with pytest.raises(ValueError), restored_on_failure(model) as outer:
        with restored_on_failure(model) as inner:
            assert inner is outer
            inner.remember("0")
            model[0].weight.data.zero_()
        raise ValueError
    assert same(model, before)


def test_another_model_inside_has_a_snapshot_of_its_own():
    first, second = mlp(), mlp()
    before = state_of(second)
    with restored_on_failure(first) as outer:
        outer.remember("0")
        first[0].weight.data.zero_()
        with pytest.raises(ValueError), restored_on_failure(second) as inner:
            assert inner is not outer
            inner.remember("0")
            second[0].weight.data.zero_()
            raise ValueError
    assert same(second, before) and not first[0].weight.any()


def test_the_copy_is_a_copy():
    model = mlp()
    with restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        kept = copy.deepcopy(snapshot._parameters["0"]["weight"])
        model[0].weight.data.add_(1)
        assert torch.equal(snapshot._parameters["0"]["weight"], kept)


def test_conv1d():
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(Conv1D(24, 32))
    before = state_of(model)
    with pytest.raises(KeyboardInterrupt), restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        sk.prune_(model, "magnitude", progress=False)
        sk.pack_(model)
        raise KeyboardInterrupt
    assert same(model, before) and type(model[0]) is Conv1D


@pytest.mark.parametrize("packed", [False, True])
def test_branches_put_there_since_are_taken_away(packed):
    model = sk.apply_(mlp(), sk.prune_(mlp(), "magnitude", progress=False))
    install_side_(model, "2", SideBranch(torch.ones(32, 4)))
    before, weight = state_of(model), model[0].weight
    with pytest.raises(KeyboardInterrupt), restored_on_failure(model) as snapshot:
        snapshot.remember("0")
        install_side_(model, "0", SideBranch(torch.ones(64, 2)))
        model[0].weight.data.mul_(2)
        if packed:
            sk.pack_(model)
        raise KeyboardInterrupt
    assert type(model[0]) is nn.Linear and isinstance(model[2], SideLinear), "the branch from before stays"
    assert same(model, before) and (packed or model[0].weight is weight)


@pytest.mark.parametrize("fails", [False, True], ids=["", "fails"])
def test_layers_are_put_back_afterwards_and_blocks_inside_start_anew(fails):
    model = mlp()
    before = state_of(model)
    with restored_on_failure(model) as outer, contextlib.suppress(KeyError), put_back_afterwards(model, ["0"]):
        outer.remember("0")
        with torch.no_grad():
            model[0].weight.fill_(2)
        with restored_on_failure(model) as inner:
            inner.remember("0")
            assert inner is not outer and bool((inner.originals()["0.weight"] == 2).all())
        if fails:
            raise KeyError
    assert same(model, before)
    with restored_on_failure(model) as outer:
        with put_back_afterwards(model, ["0"]):
            pass
        with restored_on_failure(model) as inner:
            assert inner is outer
