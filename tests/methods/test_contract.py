"""What every one-shot method promises; a new one is tested the day it is registered."""

import dataclasses
import json

import pytest
import torch

from sparsekit.methods import METHODS, Magnitude, OneShot, SparseGPT, method_config
from sparsekit.patterns import NM, parse_pattern

ONE_SHOT = [name for name, config in METHODS.items() if issubclass(config, OneShot)]
PATTERNS = [("2:4", 0.5), ("1:4", 0.75), ("3:5", 0.4), ("unstructured", 0.3), ("4x4", 0.5)]


def statistics_for(config, x_MK):
    if config.statistics is None:
        return None
    statistics = config.statistics(x_MK.shape[1], torch.device("cpu"))
    statistics.add(x_MK)
    return statistics


@pytest.mark.parametrize("pattern,sparsity", PATTERNS)
@pytest.mark.parametrize("name", ONE_SHOT)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 17), (17, 63), (8, 512), (5, 4)])
def test_decisions_are_legal_deterministic_and_finite(name, pattern, sparsity, N, K):
    generator = torch.Generator().manual_seed(N + K)
    x, w = torch.randn(40, K, generator=generator), torch.randn(N, K, generator=generator)
    w[0, 0] = 0
    config = METHODS.get(name)(pattern=pattern, sparsity=sparsity)
    first = config.decide(w.clone(), statistics_for(config, x))
    again = config.decide(w.clone(), statistics_for(config, x))
    assert first.keep.shape == (N, K) and first.keep.dtype == torch.bool
    assert parse_pattern(pattern).count_violations(first.keep) == 0
    assert torch.equal(first.keep, again.keep)
    if isinstance(parse_pattern(pattern), NM):
        n = parse_pattern(pattern).n
        assert first.keep[:, : parse_pattern(pattern).m].sum(dim=1).unique().tolist() == [min(n, K)]
    assert (first.weight is not None) == config.updates_weights
    if first.weight is not None:
        assert torch.equal(first.weight, again.weight)
        assert first.weight.isfinite().all() and first.weight.dtype == torch.float32
        assert bool((first.weight[~first.keep] == 0).all())


@pytest.mark.parametrize("name", ONE_SHOT)
def test_all_zero_and_constant_weights(name):
    config = METHODS.get(name)()
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    for w in (torch.zeros(3, 8), torch.ones(3, 8)):
        decision = config.decide(w, statistics_for(config, x))
        assert decision.keep.sum(dim=1).tolist() == [4, 4, 4]


@pytest.mark.parametrize("name,config", METHODS.items())
def test_configs_are_frozen_and_survive_json(name, config):
    pattern = "unstructured" if name in ONE_SHOT else str(config.kind)
    made = config(pattern=pattern, sparsity=0.25)
    assert config.name == name
    assert config.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.sparsity = 0.1
    with pytest.raises(TypeError):
        config("2:4")
    with pytest.raises(ValueError, match="unknown field of .*Did you mean 'sparsity'"):
        config.from_dict({"sparsty": 0.5})


def test_the_sparsity_of_a_group_is_its_own():
    assert Magnitude(pattern="1:4").sparsity == 0.75
    assert Magnitude(pattern="1:4", sparsity=0.75).sparsity == 0.75
    assert Magnitude(pattern="2:3", sparsity=0.3333).sparsity == pytest.approx(1 / 3)
    assert Magnitude(pattern=NM(2, 4)).pattern == "2:4"


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"pattern": "2:4", "sparsity": 0.6}, "pattern 2:4 removes 0.5 of the weights, and sparsity=0.6"),
        ({"pattern": "2:4", "sparsity": 0.0}, "pattern 2:4 removes 0.5"),
        ({"pattern": "unstructured", "sparsity": 1.0}, "not a share of weights"),
        ({"pattern": "unstructured", "sparsity": -0.1}, "not a share of weights"),
        ({"pattern": "unstructured", "sparsity": "half"}, "is not a number"),
        ({"pattern": "4:2"}, "N:M needs 0 < N < M"),
        ({"pattern": "two:four"}, "unknown pattern"),
        ({"pattern": "structured"}, "takes whole parts of a model out: use a method that does, as .*contribution"),
        ({"pattern": "depth"}, "takes whole parts of a model out: use a method that does, as .*depth"),
    ],
    ids=str,
)
def test_contradictions_are_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Magnitude(**fields)


def test_a_method_by_name_or_config():
    assert method_config("SparseGPT") == SparseGPT()
    assert method_config("wanda", pattern="4:8").pattern == "4:8"
    config = SparseGPT(block_size=64)
    assert method_config(config) is config
    with pytest.raises(ValueError, match="unknown method 'sparsgpt'.*'magnitude'.*Did you mean 'sparsegpt'"):
        method_config("sparsgpt")
    with pytest.raises(ValueError, match="SparseGPT itself: pass a name"):
        method_config(SparseGPT)
    with pytest.raises(ValueError, match="a dict: pass a name"):
        method_config({})
