"""Arguments of trained methods: wrong names and kinds of values are told, with the remedy first."""

import copy
import pickle
from dataclasses import replace

import pytest

import sparsekit as sk


@pytest.mark.parametrize("config", [sk.AST, sk.MaskLLM])
@pytest.mark.parametrize("make", ["call", "from_dict"])
def test_a_wrong_name_is_told_with_the_one_meant_first(config, make):
    with pytest.raises(ValueError) as caught:
        fields = {"max_stps": 3}
        config(**fields) if make == "call" else config.from_dict(fields)
    assert str(caught.value).startswith(f"unknown field of {config.__name__} 'max_stps': did you mean 'max_steps'? ")
    with pytest.raises(ValueError, match="'nonsense': Its own are pattern, .*kd_weight.*TrainingArguments are there"):
        config(nonsense=1)


@pytest.mark.parametrize(
    "field, value",
    [
        ("slorb_train_x", "yes"),
        ("slorb_refit", 1),
        ("bf16", "no"),
        ("gradient_checkpointing", "false"),
        ("ddp_find_unused_parameters", "no"),
    ],
)
def test_a_switch_is_true_or_false(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be True or False"):
        sk.AST(**{field: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"slorb_group": 16.0}, "slorb_group=16.0 must be a whole number of at least 2"),
        ({"slorb_group": True}, "slorb_group=True must be a whole number"),
        ({"mask_update_steps": True}, "mask_update_steps=True must be a whole number of at least 0"),
        ({"num_calibration_samples": "4"}, "num_calibration_samples='4' must be a whole number of at least 1"),
        ({"max_seq_length": True}, "max_seq_length=True must be a whole number of at least 2"),
        ({"temperature": "2"}, "temperature='2' must be a number"),
        ({"learning_rate": "high"}, "learning_rate='high' must be a number"),
        ({"learning_rate": 0}, "learning_rate=0 must be greater than 0"),
    ],
)
def test_numbers_are_numbers(fields, message):
    with pytest.raises(ValueError, match=message):
        sk.AST(**fields)


def test_copies_of_a_config_are_equal(ast):
    config = ast(slorb_group=16, slorb_train_x=True)
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)), replace(config)):
        assert other.own_fields() == config.own_fields()


def test_ddp_looks_for_unused_weights_only_where_it_is_told_to(ast):
    assert ast().ddp_find_unused_parameters is False
    assert ast(ddp_find_unused_parameters=True).ddp_find_unused_parameters is True
