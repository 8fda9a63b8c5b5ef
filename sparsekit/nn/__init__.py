"""Modules that run packed weights, and how they take the places of dense ones."""

from sparsekit.nn.fused import FusedGroup, disband_broken_groups_, fuse_
from sparsekit.nn.places import replace_layer_, unwrapped
from sparsekit.nn.replace import dense_layer, grid_of, remember_grid_, sparse_layers, warn_of_fallbacks
from sparsekit.nn.resize import SIZES, linear_size, resize_, set_parameters_
from sparsekit.nn.side import SideLinear, install_side_, merge_side_, merged_layer, side_branches, side_layers
from sparsekit.nn.sparse_linear import SparseLinear

__all__ = [
    "SIZES",
    "FusedGroup",
    "SideLinear",
    "SparseLinear",
    "dense_layer",
    "disband_broken_groups_",
    "fuse_",
    "grid_of",
    "install_side_",
    "linear_size",
    "merge_side_",
    "merged_layer",
    "remember_grid_",
    "replace_layer_",
    "resize_",
    "set_parameters_",
    "side_branches",
    "side_layers",
    "sparse_layers",
    "unwrapped",
    "warn_of_fallbacks",
]
