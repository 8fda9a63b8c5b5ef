"""Modules that run packed weights."""

from sparsekit.nn.sparse_linear import SparseLinear

__all__ = ["SparseLinear"]
