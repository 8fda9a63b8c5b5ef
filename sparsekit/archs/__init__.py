"""What sparsekit knows about architectures: where blocks are, how long an input may be, what feeds which layer, and
what can be cut."""

from sparsekit.archs.blocks import find_blocks
from sparsekit.archs.positions import max_positions, vocabulary_size
from sparsekit.archs.producers import Coupling, Producer, find_couplings, fold_order_, fold_scales_
from sparsekit.archs.widths import Rows, Width, describe_attention, describe_mlp, find_widths

__all__ = [
    "Coupling",
    "Producer",
    "Rows",
    "Width",
    "describe_attention",
    "describe_mlp",
    "find_blocks",
    "find_couplings",
    "find_widths",
    "fold_order_",
    "fold_scales_",
    "max_positions",
    "vocabulary_size",
]
