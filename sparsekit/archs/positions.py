"""How long an input a model takes, and from which vocabulary."""

from typing import Any

from torch import nn

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def max_positions(model: nn.Module) -> int | None:
    """Return the number of tokens that one input may hold, or None where the model does not say."""
    config: Any = getattr(model, "config", None)
    config = getattr(config, "text_config", None) or config
    found = next(
        (value for name in _NAMES if isinstance(value := getattr(config, name, None), int) and value > 0), None
    )
    if found is not None and _is_roberta(config):
        found -= int(config.pad_token_id or 0) + 1  # its position ids start behind the padding id
    return found


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of input embeddings, or None where the model has none."""
    get = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get() if callable(get) else None
    except NotImplementedError:
        return None
    size = getattr(embedding, "num_embeddings", None)
    return size if isinstance(size, int) else None


def _is_roberta(config: Any) -> bool:
    return str(getattr(config, "model_type", "")) in {"roberta", "xlm-roberta", "camembert", "longformer", "mpnet"}
