"""One-shot pruning methods: each a config that decides which weights of a layer go."""

from sparsekit.methods.base import METHODS, Decision, OneShot, method_config
from sparsekit.methods.magnitude import Magnitude
from sparsekit.methods.sparsegpt import SparseGPT
from sparsekit.methods.wanda import Wanda

__all__ = ["METHODS", "Decision", "Magnitude", "OneShot", "SparseGPT", "Wanda", "method_config"]
