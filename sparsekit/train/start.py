"""Where a trained method starts: the masks of a one-shot method, or those of a plan after holding it against the model.

Of a plan the masks count, and the order that it puts inputs into: the model must have that already, and the plan of the
run has it, too. Scales of a format are left aside, for weights or masks change, and a note says so.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from sparsekit.errors import PatternError
from sparsekit.masks import Mask
from sparsekit.methods import method_config
from sparsekit.patterns import parse_pattern
from sparsekit.plan import Plan
from sparsekit.prune import prune_
from sparsekit.registry import unknown
from sparsekit.targets import weight_NK

START_METHODS = ("magnitude", "wanda", "sparsegpt", "ria", "alps")


def check_start(argument: str, value: Any) -> None:
    """Raise ValueError unless the value of a config's argument is a plan or the name of a one-shot method."""
    if not isinstance(value, Plan) and value not in START_METHODS:
        raise ValueError(unknown(argument, value, list(START_METHODS)) + " A Plan will do, too.")


def one_shot_(trainer: Any, model: nn.Module, method: str) -> Plan:
    """Prune the model with the arguments and the data of a `SparseTrainer`, and return the plan.

    Layers that are zero throughout are missing in it. Its notes become the run's.
    """
    args = trainer.args
    plan = prune_(
        model,
        method_config(method, pattern=args.pattern),
        dataset=None if method == "magnitude" else trainer.calibration_inputs(args.num_calibration_samples),
        targets=args.targets,
        ignore=args.ignore,
        num_calibration_samples=args.num_calibration_samples,
        seed=args.seed,
        progress=not args.disable_tqdm,
    )
    trainer.notes += plan.notes
    return plan


def part_for(plan: Plan, layers: Mapping[str, nn.Module], pattern: str, argument: str) -> Plan:
    """Return the part of a plan that concerns these layers: masks, and the order of inputs.

    Args:
        argument: name of the config's argument, for messages.
    Raises:
        PatternError: a mask breaks the pattern.
        ValueError: the plan holds what cannot be gone on from, or does not fit the layers.
    """
    if plan.cuts or plan.side:
        raise ValueError(f"{argument}: the plan holds cuts or side branches: apply_ it, and pass a plan of masks alone")
    for name, layer in layers.items():
        w_NK = weight_NK(layer)
        if name not in plan.masks:
            raise ValueError(f"{argument}: the plan has no mask for {name}: make it with the same targets and ignore")
        mask = plan.masks[name]
        if mask.shape != tuple(w_NK.shape):
            raise ValueError(f"{argument}: the plan's mask of {name} is {mask.shape}, the weight {tuple(w_NK.shape)}")
        if broken := parse_pattern(pattern).count_violations(mask.keep):
            raise PatternError(f"{argument}: the plan's mask of {name} breaks {pattern} in {broken} groups")
        if name in plan.perms and not plan.perms[name].is_in(w_NK):
            raise ValueError(
                f"{argument}: the plan reorders the inputs of {name}, and this model has them in their old order: call "
                "sparsekit.surgery.reorder_(model, plan) first, or make the plan with permute=False"
            )
    masks = {name: Mask(pattern, plan.masks[name].keep) for name in layers}
    perms = {name: plan.perms[name] for name in layers if name in plan.perms}
    notes = [f"{argument}: the plan's scales of {plan.format} were left aside"] if plan.scales else []
    return Plan(masks, plan.made_by, notes=notes, perms=perms)
