"""Dense against sparse on this machine: honest timing, measured ceilings, layers, and whole models."""

from sparsekit.benchmarking.against_dense import BATCH_SIZES, against_dense
from sparsekit.benchmarking.forward import example_inputs, time_forward
from sparsekit.benchmarking.latency_table import LatencyCheck, LatencyTable, check_prediction, measure_latency
from sparsekit.benchmarking.layers import LayerShape, build_pair, in_format, measure_shapes, random24, time_layers
from sparsekit.benchmarking.machine import Ceilings, cache_bytes, environment, free_bytes, measure_ceilings
from sparsekit.benchmarking.models import benchmark, dense_twin
from sparsekit.benchmarking.shapes import SHAPES, get_shapes
from sparsekit.benchmarking.timing import Comparison, Timing, compare, rotate, time_pair

__all__ = [
    "BATCH_SIZES",
    "SHAPES",
    "Ceilings",
    "Comparison",
    "LatencyCheck",
    "LatencyTable",
    "LayerShape",
    "Timing",
    "against_dense",
    "benchmark",
    "build_pair",
    "cache_bytes",
    "check_prediction",
    "compare",
    "dense_twin",
    "environment",
    "example_inputs",
    "free_bytes",
    "get_shapes",
    "in_format",
    "measure_ceilings",
    "measure_latency",
    "measure_shapes",
    "random24",
    "rotate",
    "time_forward",
    "time_layers",
    "time_pair",
]
