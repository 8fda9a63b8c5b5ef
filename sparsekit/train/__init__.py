"""Methods that train: masks that are learnt, distillation, low-rank branches. Importing this loads transformers."""

from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.maskllm_config import MaskLLMConfig
from sparsekit.train.maskllm_trainer import MaskLLMTrainer
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_trainer import NutePruneTrainer

__all__ = [
    "ASTConfig",
    "ASTTrainer",
    "MaskLLMConfig",
    "MaskLLMTrainer",
    "NutePruneConfig",
    "NutePruneTrainer",
]
