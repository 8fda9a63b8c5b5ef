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
    samples: Sequence[dict[str, Tensor]],
    run: Callable[[dict[str, Tensor]], Any],
    loss: Callable[[], float],
) -> str:
    """Refit every branch of the student in place, and return what came of it, for the notes of the plan.

    Args:
        student: holds `SideLinear` layers; `run` is its forward, through whatever wraps it.
        teacher: the dense original, with layers of the same names.
        samples: what both are run on, one at a time, for the outputs of all the teacher's layers are held meanwhile.
        loss: mean loss of the student as it is now.
    """
    layers = side_layers(student)
    before = loss()
    changes = _changes(layers, teacher, samples, run)
    kept = {name: layer.side_S.detach().clone() for name, layer in layers.items()}
    best, chosen = before, 0.0
    for step in (*STEPS, None):  # None: done trying
        scale = chosen if step is None else step
        with torch.no_grad():
            for name, layer in layers.items():
                if name in changes:
                    layer.side_S.copy_(kept[name] + scale * _sharded_like(changes[name], layer.side_S))
        torch.clear_autocast_cache()  # it holds S as it was, in 16 bits
        if step is not None and (now := loss()) < best:
            best, chosen = now, step
    if not chosen:
        return f"branches: a refit would not lower the loss of {before:.4g}: left as trained"
    return f"branches refitted when the masks froze: loss {before:.4g} -> {best:.4g}, step {chosen:g}"


@torch.no_grad()
def _changes(
    layers: dict[str, SideLinear],
    teacher: nn.Module,
    samples: Sequence[dict[str, Tensor]],
    run: Callable[[dict[str, Tensor]], Any],
) -> dict[str, Tensor]:
    """Return the best change of each S, alone; none of a layer that no token reached, in student or teacher."""
    taught: dict[str, Tensor] = {}
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def remember(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        taught[name] = y

    def gather(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        assert isinstance(layer, SideLinear)
        target, z = taught.pop(name, None), layer.reduce(x)
        if target is None or target.shape != y.shape:  # experts, to which the two sent other tokens
            return
        with torch.autocast(y.device.type, enabled=False):  # sums of products need more than the 16 bits of a forward
            z, lack = z.flatten(0, -2).float(), (target.float() - y.float()).flatten(0, -2)
            C, Z = lack.T @ z, z.T @ z
        if name in moments:
            C, Z = moments[name][0].add_(C), moments[name][1].add_(Z)
        moments[name] = C, Z

    for sample in samples:
        taught.clear()
        with _watched({name: teacher.get_submodule(name) for name in layers}, remember):
            teacher(**sample)
        with _watched(layers, gather):
            run(sample)
    return {name: fit_residual(C, Z) for name, (C, Z) in moments.items() if bool(Z.diagonal().any())}


@contextmanager
def _watched(layers: Mapping[str, nn.Module], look: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Let `look` see (name, layer, input, output) in each forward of a layer inside the body.

    There its parameters are whole, even if they are sharded at other times.
    """

    def hook_of(name: str) -> Callable[..., None]:
        return lambda module, args, output: look(name, module, args[0].detach(), output.detach())

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(hook_of(name)).remove)
        yield


def _sharded_like(x: Tensor, parameter: Tensor) -> Tensor:
    x = x.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor):
        return distribute_tensor(x, parameter.device_mesh, parameter.placements)
    return x
