"""One-shot pruning methods: each a config that decides which weights of a layer go. Trained ones: `sparsekit.train`."""

from sparsekit.methods.base import METHODS, TRAINED, Decision, OneShot, Trained, is_trained, method_config
from sparsekit.methods.magnitude import Magnitude
from sparsekit.methods.sparsegpt import SparseGPT
from sparsekit.methods.wanda import Wanda

__all__ = [
    "Decision",
    "METHODS",
    "Magnitude",
    "OneShot",
    "SparseGPT",
    "TRAINED",
    "Trained",
    "Wanda",
    "is_trained",
    "method_config",
]
