"""How scores within layers become numbers of units for each layer."""

import torch
from torch import Tensor


def normalised(scores: Tensor, how: str) -> Tensor:
    """Return the scores of one layer, made comparable with those of others.

    Args:
        scores: [units].
        how: "minmax" to [0, 1]; "zscore" to mean 0 and variance 1; "l2" to a norm of 1; "log" for log(1 + s); "none".
    """
    if how == "minmax":
        low, high = scores.min(), scores.max()
        return (scores - low) / (high - low) if high > low else torch.ones_like(scores)
    if how == "zscore":
        spread = scores.std() if len(scores) > 1 else scores.new_tensor(0.0)
        return (scores - scores.mean()) / spread if spread > 0 else torch.zeros_like(scores)
    if how == "l2":
        return scores / scores.norm().clamp_min(torch.finfo(scores.dtype).tiny)
    return scores.log1p() if how == "log" else scores


def best_units(scores: Tensor, num: int) -> Tensor:
    """Return the `num` units with the largest scores, int64, ascending; among equals the lower index stays."""
    return scores.sort(descending=True, stable=True).indices[:num].sort().values
