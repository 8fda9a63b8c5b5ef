"""The linear layers of models people run, for measuring without the model."""

from sparsekit.benchmarking.layers import LayerShape
from sparsekit.registry import unknown


def llama_shapes(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int
) -> list[LayerShape]:
    """Return the shapes of a Llama-style decoder, equal ones together."""
    queries, keys = heads * head_dim, kv_heads * head_dim
    named = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (intermediate, hidden),
        "up_proj": (intermediate, hidden),
        "down_proj": (hidden, intermediate),
    }
    return group_shapes([(name, N, K) for name, (N, K) in named.items() for _ in range(layers)])


def group_shapes(layers: list[tuple[str, int, int]]) -> list[LayerShape]:
    """Return one `LayerShape` for each distinct (N, K) of (name, N, K)."""
    groups: dict[tuple[int, int], list[str]] = {}
    for name, N, K in layers:
        groups.setdefault((N, K), []).append(name.rpartition(".")[2])
    return [LayerShape(", ".join(dict.fromkeys(names)), N, K, len(names)) for (N, K), names in groups.items()]


SHAPES: dict[str, list[LayerShape]] = {
    "llama-3-8b": llama_shapes(4096, 14336, 32, 32, 8, 128),
    "llama-3-70b": llama_shapes(8192, 28672, 80, 64, 8, 128),
    "llama-3.2-1b": llama_shapes(2048, 8192, 16, 32, 8, 64),
    "llama-2-7b": llama_shapes(4096, 11008, 32, 32, 32, 128),
    "qwen2.5-7b": llama_shapes(3584, 18944, 28, 28, 4, 128),
    "qwen3-4b": llama_shapes(2560, 9728, 36, 32, 8, 128),
    "mistral-7b": llama_shapes(4096, 14336, 32, 32, 8, 128),
}


def get_shapes(name: str) -> list[LayerShape]:
    """Return the layer shapes of a model by name.

    Raises:
        ValueError: no such name; the message lists the known ones.
    """
    if name.lower() not in SHAPES:
        raise ValueError(unknown("shapes", name, list(SHAPES)))
    return SHAPES[name.lower()]
