"""S fitted once more, when the masks have settled, to what each layer then lacks against the dense original.

For a layer with input x, branch input z and outputs y of the student, y' of the teacher on the same tokens, the change
of S that brings y nearest to y' is dS = C Z^-1, C = sum of (y' - y) z^T and Z = sum of z z^T. Each is the best for its
own layer while all the others stay, so together they can overshoot: of a full, a half and a quarter step that one is
taken which lowers the loss most, and none where none does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sparsekit.nn.side import SideLinear, side_layers
from sparsekit.train.lowrank import fit_residual

STEPS = (1.0, 0.5, 0.25)


def refit_branches_(
    student: nn.Module,
    teacher: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    run: Callable[[dict[str, Tensor]], Any],
    loss: Callable[[], float],
) -> str:
    """Refit every branch of the student in place, and return what came of it, for the notes of the plan.

    Args:
        student: holds `SideLinear` layers; `run` is its forward, through whatever wraps it.
        teacher: the dense original, with layers of the same names.
        batches: what both are run on.
        loss: mean loss of the student as it is now.
    """
    layers = side_layers(student)
    before = loss()
    changes = _changes(layers, teacher, batches, run)
    kept = {name: layer.side_S.detach().clone() for name, layer in layers.items()}
    best, chosen = before, 0.0
    for step in (*STEPS, None):  # None: done trying
        scale = chosen if step is None else step
        with torch.no_grad():
            for name, layer in layers.items():
                if name in changes:
                    layer.side_S.copy_(kept[name] + scale * _sharded_like(changes[name], layer.side_S))
        if step is not None and (now := loss()) < best:
            best, chosen = now, step
    if not chosen:
        return f"branches: a refit would not lower the loss of {before:.4g}: left as trained"
    return f"branches refitted when the masks froze: loss {before:.4g} -> {best:.4g}, step {chosen:g}"


@torch.no_grad()
def _changes(
    layers: dict[str, SideLinear],
    teacher: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    run: Callable[[dict[str, Tensor]], Any],
) -> dict[str, Tensor]:
    """Return the best change of each S, alone; of a layer that no token reached, none."""
    targets: dict[str, Tensor] = {}
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def gather(name: str, z: Tensor, y: Tensor) -> None:
        z, lack = z.flatten(0, -2).float(), (targets[name] - y).flatten(0, -2).float()
        C, Z = moments.get(name, (torch.zeros((), device=z.device), torch.zeros((), device=z.device)))
        moments[name] = C + lack.T @ z, Z + z.T @ z

    for batch in batches:
        with _watched({name: teacher.get_submodule(name) for name in layers}, lambda layer, x: x) as taught:
            teacher(**batch)
        targets = {name: y for name, (_, y) in taught.items()}
        with _watched(layers, lambda layer, x: layer.reduce(x)) as seen:
            run(batch)
        for name, (z, y) in seen.items():
            gather(name, z, y)
    return {name: fit_residual(C, Z) for name, (C, Z) in moments.items() if bool(Z.diagonal().any())}


@contextmanager
def _watched(
    layers: Mapping[str, nn.Module], of: Callable[[Any, Tensor], Tensor]
) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Yield a dict that gathers name -> (what `of` makes of layer and input, output) of the next forward.

    `of` is called in the forward, where the layer's parameters are whole even if they are sharded at other times.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            seen[name] = of(module, args[0].detach()), output.detach()

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(keep(name)).remove)
        yield seen


def _sharded_like(x: Tensor, parameter: Tensor) -> Tensor:
    x = x.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(x, parameter.device_mesh, parameter.placements)
    return x
