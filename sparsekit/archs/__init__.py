"""What sparsekit knows about model architectures: where the repeated blocks are, how long an input may be."""

from sparsekit.archs.blocks import find_blocks
from sparsekit.archs.positions import max_positions, vocabulary_size

__all__ = ["find_blocks", "max_positions", "vocabulary_size"]
