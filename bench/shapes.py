"""Real layer shapes, and the numbers of tokens to try them at.

    python bench/shapes.py

The table itself is `sparsekit.benchmarking.SHAPES`, so that `sparsekit bench --shapes` and the doctor have it too.
"""

from sparsekit.benchmarking import SHAPES, get_shapes
from sparsekit.report import Report

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""From decoding one sequence to a long prompt."""

__all__ = ["NUM_TOKENS", "SHAPES", "get_shapes"]


def main() -> None:
    rows = [
        {"model": model, "layer": shape.name, "N": shape.out_features, "K": shape.in_features, "count": shape.count}
        for model, shapes in SHAPES.items()
        for shape in shapes
    ]
    Report("Layer shapes: W is [N, K], y = x W^T", rows).print()


if __name__ == "__main__":
    main()
