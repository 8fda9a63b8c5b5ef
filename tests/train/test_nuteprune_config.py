"""What `sk.NutePrune` takes, what it refuses and in which words, and what the published recipe is."""

import json

import pytest

import sparsekit as sk
from sparsekit.patterns import Structured
from sparsekit.train.nuteprune_config import NutePruneConfig


def make(**fields):
    return NutePruneConfig(**{"use_cpu": True, **fields})


def test_defaults_and_names():
    config = make()
    assert sk.NutePrune is sk.NutePruneConfig is NutePruneConfig
    assert config.parsed_pattern == Structured() and config.budget == 0.5 and config.prunes
    assert config.kinds == ("heads", "channels") and config.lora_alpha == 16.0 and config.keep == []
    assert make(hidden=True, layers=True).kinds == ("heads", "channels", "hidden", "layers")
    assert not make(sparsity=0).prunes


def test_where_it_starts_and_what_follows_from_that():
    config = make(sparsity=0.5, keep=[0.2], stages="40%")
    assert (config.start, config.sparsity_warmup, config.frozen_share) == ("contribution", 0.0, 1.0)
    assert config.is_one_shot and config.stage_starts(10) == [(0, 0.2), (3, 0.4), (6, None)]
    for config in (make(start="open"), make(layers=True)):
        assert (config.start, config.sparsity_warmup, config.frozen_share) == ("open", 0.3, 0.2)
        assert not config.is_one_shot and config.stage_starts(10) == []
    assert make(hidden=True).start == "contribution"
    assert NutePruneConfig.paper(use_cpu=True).start == "open" and not make(sparsity=0).is_one_shot


def test_fields_go_through_json_and_back():
    config = make(sparsity=0.4, keep=["10%", 0.2, 0.1], stages=[0.3], lora_targets="q_proj", lora_alpha=8, max_steps=7)
    fields = json.loads(json.dumps(config.own_fields()))
    del fields["lr_scheduler_type"]
    assert fields["keep"] == [0.1, 0.2] and fields["lora_targets"] == ["q_proj"]
    again = NutePruneConfig.from_dict({**fields, "use_cpu": True})
    assert again.own_fields() == config.own_fields()


def test_the_budget_may_be_another_than_a_sparsity():
    assert make(constraints={"speedup": 1.5}).budget == {"speedup": 1.5}
    assert make(constraints={"params": "60%"}).prunes


def test_the_published_recipe():
    config = NutePruneConfig.paper(sparsity=0.5, use_cpu=True)
    assert (config.teachers, config.hidden, config.frozen_share) == ("paper", True, 0.0)
    assert (config.lora_rank, config.lora_alpha, config.lora_targets) == (8, 8.0, ["q_proj", "v_proj"])
    assert (config.kd_weight, config.hidden_weight, config.ce_weight) == (0.1, 0.9, 0.0)
    assert config.temperature == pytest.approx(2 / 3) and config.sparsity_warmup == pytest.approx(1 / 7)
    assert (config.learning_rate, config.gate_learning_rate) == (1e-3, 0.1)
    assert NutePruneConfig.paper(sparsity=0.2, use_cpu=True).sparsity_warmup == pytest.approx(4 / 7)
    assert NutePruneConfig.paper(sparsity=0.25, use_cpu=True).sparsity_warmup == pytest.approx(1 / 7)
    assert NutePruneConfig.paper(constraints={"speedup": 1.5}, use_cpu=True).hidden is False
    own = NutePruneConfig.paper(sparsity=0.2, hidden=False, sparsity_warmup=0.1, use_cpu=True)
    assert (own.hidden, own.sparsity_warmup) == (False, 0.1)


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"sparsity": 1.0}, "sparsity=1.0 is not a share"),
        ({"sparsity": "20%"}, "sparsity='20%' is not a number"),
        ({"sparsity": 0.2, "constraints": {"flops": "60%"}}, "are two budgets: give one of them"),
        ({"constraints": {"flop": "60%"}}, "Did you mean 'flops'"),
        ({"pattern": "2:4"}, "nuteprune makes the pattern structured, and pattern='2:4' was asked for"),
        ({"gates": "soft"}, "gates.*'soft'.*hard_concrete"),
        ({"teachers": "papers"}, "Did you mean 'paper'"),
        ({"ramp": "quadratic"}, "ramp.*'quadratic'.*cubic"),
        ({"hidden_loss": "mse"}, "hidden_loss.*'mse'.*relative"),
        ({"kd_reduction": "mean"}, "kd_reduction.*'mean'.*tokens"),
        ({"sparsity_warmup": 1.2}, "sparsity_warmup=1.2 is a share"),
        ({"sparsity_warmup": 0.9, "frozen_share": 0.2}, "sparsity_warmup=0.9 and frozen_share=0.2 are more than the"),
        ({"frozen_share": -0.1}, "frozen_share=-0.1 is a share"),
        ({"gate_learning_rate": 0.0}, "gate_learning_rate=0 must be greater than 0"),
        ({"temperature": 0}, "temperature=0 must be greater than 0"),
        ({"lora_rank": 0}, "lora_rank=0 must be a whole number of at least 1"),
        ({"lora_alpha": 0}, "lora_alpha=0 must be greater than 0"),
        ({"lora_targets": []}, r"lora_targets=\[\]: give 'all-linear', or names"),
        ({"lora_targets": 3}, "lora_targets=3: give 'all-linear', or names"),
        ({"teachers": "none"}, "teachers='none' and ce_weight=0: there is nothing to learn from"),
        ({"kd_weight": 0, "hidden_weight": 0}, "are all 0: there is nothing to learn from"),
        ({"keep": [0.2, 0.6]}, r"keep=\[0.2, 0.6\]: these are on the way to sparsity=0.5"),
        ({"keep": [0.5]}, "these are on the way to sparsity=0.5"),
        ({"keep": ["x"]}, "sparsity='x' is no budget"),
        ({"keep": [0.1], "constraints": {"speedup": 1.5}}, r"keep=\[0.1\] goes with a sparsity"),
        ({"hidden": True, "constraints": {"latency_ms": 3}}, "hidden=True and .*latency_ms.* heads and channels only"),
        ({"hidden": True, "merge_lora": False}, "cannot be cut with hidden dimensions; leave merge_lora at True, or"),
        ({"untie": True}, "untie=True is for hidden=True"),
        ({"uniform": "yes"}, "uniform='yes' must be True or False"),
        ({"round_to": 0}, "round_to=0 must be a whole number"),
        ({"fp16": True}, "fp16=True: pruned models leave the range of fp16"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant=True loses the gradient"),
        ({"sparsty": 0.2}, "unknown field of NutePruneConfig 'sparsty': did you mean 'sparsity'"),
        ({"save_only_model": True}, "save_only_model=True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        make(**fields)
