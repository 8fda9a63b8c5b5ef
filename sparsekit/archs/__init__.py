"""What sparsekit knows about architectures: where blocks are, how long an input may be, what feeds which layer."""

from sparsekit.archs.blocks import find_blocks
from sparsekit.archs.positions import max_positions, vocabulary_size
from sparsekit.archs.producers import Coupling, Producer, find_couplings, fold_order_, fold_scales_

__all__ = [
    "Coupling",
    "Producer",
    "find_blocks",
    "find_couplings",
    "fold_order_",
    "fold_scales_",
    "max_positions",
    "vocabulary_size",
]
