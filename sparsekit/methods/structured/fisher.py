"""Post-training pruning by the Fisher information of masks (Kwon et al., arXiv 2204.09656): the labelled baseline.

A mask m of ones stands at the input of each reader, a number for each head and each filter. Over batches b of labelled
data, g_b = ∂L_b/∂m, and a unit is worth I = Σ_b g_b² (the loss grows by I (1 - m)²/2, if units do not interact). Three
steps:

1. Search: of all masks that the budget pays for, the one with the largest sum of I.
2. Rearrangement: with as many zeros in each layer, and units that do interact, min (1-m)ᵀ (Σ_b g_b g_bᵀ) (1-m), by
   one swap at most for each unit that stays.
3. Tuning: scales, layer by layer (`scaled`). Heads of the first block are left out, and the last filters are tuned on
   the first token alone where that is all a classifier reads, as in the official code.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.calibration.quiet import as_in_inference
from sparsekit.errors import NonFiniteError
from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.base import Job, Reader, global_values
from sparsekit.methods.structured.inputs import run
from sparsekit.methods.structured.scaled import ScaledMethod


@dataclass(frozen=True, kw_only=True)
class Fisher(ScaledMethod):
    """Pruning by mask gradients, with labels.

    Attributes:
        rearrange: whether step 2 is taken.
    """

    rearrange: bool = True

    name = "fisher"
    needs_labels = True

    def score(self, job: Job) -> dict[str, Tensor]:
        job.gradients = mask_gradients(job)
        return {name: gradients.square().sum(dim=0) for name, gradients in job.gradients.items()}

    def values(self, job: Job) -> dict[str, Tensor]:
        return global_values(job.scores)

    def choose(self, job: Job, reader: Reader, num: int) -> Tensor:
        kept = super().choose(job, reader, num)
        return rearranged(kept, job.gradients[reader.width.name]) if self.rearrange else kept

    def is_tuned(self, job: Job, reader: Reader) -> bool:
        return reader.width != job.widths[0] or reader.width.kind != "heads"


def mask_gradients(job: Job) -> dict[str, Tensor]:
    """Return width -> gradient of each batch's loss by the mask of its units, float64 [batches, num_units].

    Raises:
        ValueError: the model gives no loss for the batches.
        NonFiniteError: a gradient is NaN or infinite.
    """
    rows: dict[str, list[Tensor]] = {width.name: [] for width in job.widths}
    device = next(job.model.parameters()).device
    asking = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    config: Any = getattr(job.model, "config", None)
    problem_type = getattr(config, "problem_type", None)  # which classifiers guess from labels, and write down
    try:
        for parameter in asking:
            parameter.requires_grad_(False)
        with as_in_inference(job.model), torch.enable_grad():
            for batch in job.labelled:
                masks = {
                    width.name: torch.ones(width.num_units, device=device, requires_grad=True) for width in job.widths
                }
                hooks = [_masked(job.reader(width), masks[width.name]) for width in job.widths]
                try:
                    loss = getattr(run(job.model, batch), "loss", None)
                finally:
                    for hook in hooks:
                        hook.remove()
                if loss is None:
                    raise ValueError(
                        f"method='fisher': {type(job.model).__name__} gives no loss for labels: use a model with a "
                        "task head, or a method without labels, as 'contribution'"
                    )
                gradients = torch.autograd.grad(loss, list(masks.values()), allow_unused=True)
                for name, gradient in zip(masks, gradients, strict=True):
                    row = torch.zeros_like(masks[name]) if gradient is None else gradient
                    rows[name].append(row.double().cpu())
                job.bar.advance(0, "mask gradients")
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
        if hasattr(config, "problem_type"):
            config.problem_type = problem_type
    found = {name: torch.stack(each) for name, each in rows.items()}
    for name, each in found.items():
        if not bool(each.isfinite().all()):
            raise NonFiniteError(f"the gradients at {name} hold NaN or infinity: check the weights, and the labels")
    return found


def _masked(reader: Reader, mask: Tensor) -> torch.utils.hooks.RemovableHandle:
    """Let the reader see its inputs times the mask of their units."""

    def multiply(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] * mask.repeat_interleave(reader.width.columns).to(args[0].dtype), *args[1:])

    return reader.layer.register_forward_pre_hook(multiply)


def rearranged(kept: Tensor, gradients: Tensor) -> Tensor:
    """Return as many units to keep as `kept`, after one pass of swaps that lower |Σ over removed units of g|².

    Each kept unit, the least worth first, is added to those that go, and then the one of these stays whose absence
    leaves the shortest sum.

    Args:
        kept: int64 [n], units.
        gradients: [batches, units].
    """
    g = gradients.T.contiguous()
    num_gone = len(g) - len(kept)
    if not num_gone or not len(kept):
        return kept
    order = g.square().sum(dim=1).sort().indices.tolist()
    gone = order[:num_gone]
    total = g[gone].sum(dim=0)
    for unit in order[num_gone:]:
        gone.append(unit)
        total = total + g[unit]
        stays = int((total - g[gone]).square().sum(dim=1).argmin())
        total = total - g[gone.pop(stays)]
    is_kept = torch.ones(len(g), dtype=torch.bool)
    is_kept[gone] = False
    return is_kept.nonzero().flatten()


METHODS.register("fisher", Fisher)
