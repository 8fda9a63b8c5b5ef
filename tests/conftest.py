"""What every test shares: one thread, poisoned memory, and where real models and data may lie."""

import os
from pathlib import Path

import pytest
import torch

# Two pytest workers on two cores: more threads would only wait for one another.
torch.set_num_threads(int(os.environ.get("SPARSEKIT_TEST_THREADS", "1")))

REPOSITORY = Path(__file__).parent.parent
SHARED = REPOSITORY.parent / "shared"
"""Real models and text beside the checkout; tests that want them skip where they are absent."""


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fill `torch.empty` with NaN (or the largest integer), so that whatever is left unwritten shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def shared() -> Path:
    """The folder of real models and data."""
    if not SHARED.is_dir():
        pytest.skip("the folder of real models and data is not beside this checkout")
    return SHARED


@pytest.fixture
def wikilm() -> Path:
    """The trained language model that the repository ships."""
    return REPOSITORY / "demo" / "wikilm"
