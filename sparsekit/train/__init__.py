"""Methods that train: masks that are learnt, distillation, low-rank branches. Importing this loads transformers."""

from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.ast_trainer import ASTTrainer

__all__ = ["ASTConfig", "ASTTrainer"]
