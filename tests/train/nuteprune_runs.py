"""Short runs of NutePrune on a tiny Llama, for the tests of it."""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_trainer import NutePruneTrainer

VOCABULARY = 61
SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """Each run of a Trainer collects garbage: among the objects of these tests alone that is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(kv_heads=2, dtype=torch.float32, **changes):
    """Four heads of four, and so many channels that one is a thousandth of the blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 203, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_key_value_heads": kv_heads}
    sizes |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def text(num=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(2, VOCABULARY, (num, 12), generator=generator))


def config(folder, **changes):
    """Gates that get there in a few steps."""
    short = {"max_steps": 10, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    short |= {"sparsity": 0.4, "gate_learning_rate": 2.0, "multiplier_learning_rate": 2.0, "learning_rate": 5e-3}
    short |= {
        "start": "open",
        "hidden_weight": 0.0,
        "sparsity_warmup": 0.3,
        "frozen_share": 0.3,
        "teacher_steps": 2,
        "lora_rank": 2,
    }
    short |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True}
    return NutePruneConfig(**{**short, **changes})


def train(model, folder, data=None, callbacks=None, resume=None, eval_data=None, **changes):
    data = text() if data is None else data
    trainer = NutePruneTrainer(model, config(folder, **changes), data, eval_data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.stack(text(3, seed=5))).logits


def in_blocks(model):
    """Weights of the blocks' linear layers, counted from the model alone, without side branches."""
    others = ("norm", "side_")
    named = model.model.layers.named_parameters()
    return sum(p.numel() for name, p in named if not any(other in name for other in others))


def assert_same_model(model, expected):
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]
    for (name, now), (_, then) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(now, then), name


def assert_plain(model, before):
    """Nothing of the training is left but other numbers."""
    modules = dict(before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.use_cache is True  # Trainer's own is False
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


class AtStepEnd(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state)
