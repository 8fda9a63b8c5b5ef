"""Models of every family that is promised, random and small, with odd sizes; float32."""

from collections.abc import Callable

import torch
from torch import nn

VOCABULARY = 61


def _llama_like(family: str) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=10,
        max_position_embeddings=64,
        tie_word_embeddings=family == "Qwen2",
    )
    return getattr(transformers, f"{family}ForCausalLM")(config)


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            word_embed_proj_dim=12,
            ffn_dim=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=20, n_layer=2, n_head=2))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=20,
            intermediate_size=36,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            num_labels=3,
        )
    )


def _distilbert() -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(
        DistilBertConfig(
            vocab_size=VOCABULARY, dim=20, hidden_dim=36, n_layers=2, n_heads=2, max_position_embeddings=64
        )
    )


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCABULARY, d_model=20, d_kv=10, d_ff=36, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    )


def roberta() -> nn.Module:
    """A tiny RoBERTa, with three heads."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3)
    config = RobertaConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=0, **sizes)
    return RobertaForSequenceClassification(config).eval()


def vit() -> nn.Module:
    """A tiny vision transformer, of images 3x8x8, with three heads."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = dict(hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=5, **sizes)).eval()


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: _llama_like("Llama"),
    "mistral": lambda: _llama_like("Mistral"),
    "qwen2": lambda: _llama_like("Qwen2"),
    "qwen3": lambda: _llama_like("Qwen3"),
    "opt": _opt,
    "gpt2": _gpt2,
    "bert": _bert,
    "distilbert": _distilbert,
}


def tiny_model(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = _t5() if family == "t5" else BUILDERS[family]()
    for module in model.modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            nn.init.normal_(module.weight, std=0.3)
    return model.eval()


def token_samples(num: int = 6, length: int = 24, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(1, VOCABULARY, (num, length), generator=generator))
