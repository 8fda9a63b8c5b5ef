"""Small models, tokens and arguments for tests of training."""

import pytest
import torch

VOCABULARY = 64


@pytest.fixture
def llama():
    """Make a Llama of two blocks; down_proj has 63 inputs, so that its last group is short."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(dtype=torch.float32, seed=0, **options):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "intermediate_size": 63, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
        config = LlamaConfig(**{"vocab_size": VOCABULARY, **sizes, **heads, **options})
        return LlamaForCausalLM(config).to(dtype).eval()

    return make


@pytest.fixture
def gpt2():
    """Make a GPT-2 of one block, whose layers store their weights transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    def make():
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=1, n_head=4, n_inner=63)
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return GPT2LMHeadModel(config).eval()

    return make


@pytest.fixture
def tokens():
    """Make samples in which the next token can be learnt: it goes up by a step of the sample's own."""

    def make(num_samples=64, length=16):
        generator = torch.Generator().manual_seed(0)
        starts, steps = (torch.randint(0, high, (num_samples, 1), generator=generator) for high in (VOCABULARY, 4))
        rows = (starts + (steps + 1) * torch.arange(length)) % VOCABULARY
        return list(rows[:, None])

    return make


@pytest.fixture
def ast(tmp_path):
    """Make arguments of a short run that flips masks."""
    from sparsekit.train.ast_config import ASTConfig

    def make(**options):
        short = {
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-2,
            "start": "magnitude",
            "mask_update_steps": 2,
            "mask_freeze_ratio": 0.25,
            "masked_decay_warmup": 0.25,
            "num_calibration_samples": 8,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": True,
            "output_dir": str(tmp_path / "run"),
        }
        return ASTConfig(**{**short, **options})

    return make
