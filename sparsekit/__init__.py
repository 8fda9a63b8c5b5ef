"""Make transformers smaller and really faster: from a mask to a measured speed-up.

    import sparsekit as sk

    model = sk.sparsify(model, "2:4", dataset=texts, tokenizer=tokenizer)   # prune, pack, check
    print(sk.benchmark(model))                                              # dense against sparse, on this machine
    sk.save(model, "my-model-2of4")

Importing this package loads neither transformers nor Triton and touches no device; it only arranges that
`from_pretrained` reads packed checkpoints.
"""

from typing import Any as _Any

from sparsekit.benchmarking import benchmark
from sparsekit.check import check, explain
from sparsekit.checkpoint import load, save
from sparsekit.doctor import doctor
from sparsekit.errors import CheckpointError, NonFiniteError, PatternError, SparsekitError, Unsupported
from sparsekit.evaluate import perplexity
from sparsekit.hf.register import register as _register_with_transformers
from sparsekit.masks import Mask
from sparsekit.methods import (
    ALPS,
    AWQ,
    FLAP,
    KCM,
    METHODS,
    RIA,
    Contribution,
    Depth,
    Fisher,
    Magnitude,
    MagnitudeSP,
    SliceGPT,
    SparseGPT,
    Wanda,
    WandaSP,
)
from sparsekit.nn import SideLinear, SparseLinear
from sparsekit.nn.side import merge_side_
from sparsekit.pack import pack_, unpack_
from sparsekit.patterns import NM, Block, Pattern, Unstructured
from sparsekit.plan import Plan, SideBranch
from sparsekit.prune import prune_
from sparsekit.reconstruct import reconstruct_
from sparsekit.report import Report
from sparsekit.sparsify import sparsify
from sparsekit.surgery import apply_
from sparsekit.version import __version__

_register_with_transformers()

_TRAINING = {
    "AST": "ASTConfig",
    "ASTConfig": "ASTConfig",
    "ASTTrainer": "ASTTrainer",
    "MaskLLM": "MaskLLMConfig",
    "MaskLLMConfig": "MaskLLMConfig",
    "MaskLLMTrainer": "MaskLLMTrainer",
    "NutePrune": "NutePruneConfig",
    "NutePruneConfig": "NutePruneConfig",
    "NutePruneTrainer": "NutePruneTrainer",
}
"""Name here -> name in `sparsekit.train`, which takes transformers along and so waits until it is asked for."""


def __getattr__(name: str) -> _Any:
    if name in _TRAINING:
        from sparsekit import train

        return getattr(train, _TRAINING[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_TRAINING})


__all__ = [
    "ALPS",
    "AWQ",
    "METHODS",
    "NM",
    "RIA",
    "Block",
    "CheckpointError",
    "Contribution",
    "Depth",
    "FLAP",
    "Fisher",
    "KCM",
    "Magnitude",
    "MagnitudeSP",
    "Mask",
    "NonFiniteError",
    "Pattern",
    "PatternError",
    "Plan",
    "Report",
    "SideBranch",
    "SideLinear",
    "SliceGPT",
    "SparseGPT",
    "SparseLinear",
    "SparsekitError",
    "Unstructured",
    "Unsupported",
    "Wanda",
    "WandaSP",
    "__version__",
    "apply_",
    "benchmark",
    "check",
    "doctor",
    "explain",
    "load",
    "merge_side_",
    "pack_",
    "perplexity",
    "prune_",
    "reconstruct_",
    "save",
    "sparsify",
    "unpack_",
]
