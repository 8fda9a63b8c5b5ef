"""AdamW that keeps its parameters N:M sparse while every weight goes on learning.

A masked parameter always holds W * m, which is what the forward multiplies by. The dense W, the mask m and Adam's
moments are optimizer state. Autograd then gives dL/d(W * m) on every entry, and the step applies it to all of W: the
straight-through gradient of AST (arXiv 2407.20584, section 3) without a mask in the forward. So the model stays a plain
one for DDP, FSDP2, gradient checkpointing and `torch.compile`, nothing of its size is kept for the backward, and a
checkpoint of the model is sparse at any time.

Entries that the mask removes are pulled to zero with strength lambda, in one of three ways (`masked_decay_kind`). With
g the loss gradient, M and V the moments, ^ for bias correction and gamma for the learning rate:

    decoupled   Adam with g, then                                          W -= gamma lambda (1 - m) W
    gradient    Adam with g + lambda (1 - m) W
    paper       M of g alone; u = M^ + lambda (1 - m) W; V of u^2;         W -= gamma u / (sqrt(V^) + eps)

`paper` departs from the published code where that is wrong: removed entries shrink (there all of them grow, for `~` of
an integer mask is -1 or -2), and the bias of M is corrected once (there lambda's term is scaled by 1 / (1 - beta1^t)).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim.adamw import adamw

from sparsekit.errors import PatternError, Unsupported
from sparsekit.patterns import NM

MaskedDecayKind = Literal["decoupled", "gradient", "paper"]
MASKED_DECAY_KINDS: tuple[str, ...] = get_args(MaskedDecayKind)

_KEPT, _KEPT_AT_FIRST = 1, 2
"""Bits of the state `flags`, uint8, one entry a weight."""

Rewrite = Callable[[str, Tensor, Tensor, dict[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
"""(name, W * m as [N, K], m, the parameters of the branch beside it by name) -> what they shall hold.

The weight shall be zero where m is. Of parameters that are sharded by rows, each rank passes its own rows.
"""


@dataclass(frozen=True)
class MaskStatistics:
    """What the masks do, over all masked weights.

    Attributes:
        flip_rate: share of the entries that the last refresh changed; a swap is two of them (spec: r_t).
        initial_flip_rate: share of the entries that differ from the first mask (i_t).
        revived: entries kept now that the first mask removed.
        masked_energy: |(1 - m) W|^2 / |W|^2 of the dense weights.
    """

    flip_rate: float
    initial_flip_rate: float
    revived: int
    masked_energy: float


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) for masked and plain parameters; see the module's text.

    A group with `masked=True` holds weights of linear layers, and beside `params` the lists `names` and `transposed`
    (True for the [K, N] weights of `Conv1D`). State of a masked parameter: `dense` fp32, `flags` uint8, `exp_avg`,
    `exp_avg_sq`, `step`, of the parameter's shape and sharding. Plain parameters of 16 bits have a `dense` too: a step
    is often smaller than their last bit. So have those of a group with the list `branch`: plain parameters of branches
    beside masked weights, which `rewrite` sees and writes, too; the list names them, as "<name of the layer>.side_S".

    Args:
        groups: parameter groups; options as below can be given for each.
        pattern: N:M, along in_features.
        lr, betas, eps, weight_decay: of AdamW. Weight decay acts on all of W.
        masked_decay_kind: "decoupled", "gradient" or "paper".
        hysteresis: share by which a removed entry must exceed a kept one to take its place.
        keep: name -> first mask, boolean [N, K]; where a name is missing, the magnitude mask of its weight.
        rewrite: transform on the way to the parameter, as fake quantisation; None for none.

    The trainer sets `masked_decay` (lambda) before each step, and calls `mask_()` once before the first forward.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        pattern: NM,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        masked_decay_kind: str = "decoupled",
        hysteresis: float = 0.0,
        keep: dict[str, Tensor] | None = None,
        rewrite: Rewrite | None = None,
    ) -> None:
        if masked_decay_kind not in MASKED_DECAY_KINDS:
            raise ValueError(f"masked_decay_kind={masked_decay_kind!r}: use one of {', '.join(MASKED_DECAY_KINDS)}")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "masked": False}
        super().__init__(groups, defaults)
        for group in self.param_groups:
            if group["masked"] and not len(group["params"]) == len(group["names"]) == len(group["transposed"]):
                raise ValueError("a masked group needs names and transposed, one for each of its params")
            if len(group.get("branch", group["params"])) != len(group["params"]):
                raise ValueError("branch needs a name for each of its group's params")
        self.pattern, self.hysteresis, self.masked_decay_kind = pattern, hysteresis, masked_decay_kind
        self.masked_decay: float | None = 0.0
        """lambda; None lets it follow the gradients of each weight, see `follow`."""
        self.follow = 0.0
        """Where `masked_decay` is None: lambda = follow * rms(M) / rms(W), for each weight."""
        self.rewrite = rewrite
        self._first_keep = dict(keep or {})
        self._num_flipped = 0
        self.mean_masked_decay = 0.0
        """lambda of the last step, its mean over the weights."""

    @torch.no_grad()
    def mask_(self) -> None:
        """Take the dense weights out of masked parameters that have no state yet, and mask them."""
        new = [one for one in self.masked() if "flags" not in self.state[one[1]]]
        for one in new:
            self._start(*one)
        if new:
            self.write_()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.mask_()
        self._lambdas: list[float] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    one = self._step_masked if group["masked"] else self._step_plain
                    one(group, parameter, local_part(parameter.grad))
        self.write_()
        self.mean_masked_decay = sum(self._lambdas) / max(len(self._lambdas), 1)
        return loss

    @torch.no_grad()
    def refresh_masks_(self) -> MaskStatistics:
        """Choose every mask anew from |W|, and rewrite the parameters."""
        self._num_flipped = 0
        for _, parameter, transposed in self.masked():
            state = self.state[parameter]
            flags, scores = local_part(state["flags"]), local_part(state["dense"]).abs()
            old = flags & _KEPT
            scores *= 1 + self.hysteresis * old
            keep = self._project(scores, transposed).to(torch.uint8)
            self._num_flipped += int((keep ^ old).sum())
            flags.copy_((flags & ~_KEPT) | keep)
        self.write_()
        return self.statistics()

    def statistics(self) -> MaskStatistics:
        """Return what the masks do, over all weights and ranks."""
        sums = torch.zeros(6, dtype=torch.float64)  # entries, flips, flips since the first, revived, energies
        sums[1] = self._num_flipped
        group = None
        for _, parameter, _ in self.masked():
            state = self.state[parameter]
            flags, dense = local_part(state["flags"]), local_part(state["dense"])
            keep, first = flags & _KEPT, (flags & _KEPT_AT_FIRST) >> 1
            removed = (dense * (1 - keep)).double().square().sum()
            found: list[Any] = [flags.numel(), 0, (keep ^ first).sum(), (keep & (1 - first)).sum(), removed]
            sums += torch.tensor([float(one) for one in [*found, dense.double().square().sum()]], dtype=torch.float64)
            group = _process_group(parameter) or group
        if group is not None:
            on_device = sums.to("cpu" if torch.distributed.get_backend(group) == "gloo" else "cuda")
            torch.distributed.all_reduce(on_device, group=group)
            sums = on_device.cpu()
        entries, flips, since_first, revived, removed, energy = sums.tolist()
        entries, energy = max(entries, 1.0), max(energy, 1e-300)
        return MaskStatistics(flips / entries, since_first / entries, int(revived), removed / energy)

    def keep(self) -> dict[str, Tensor]:
        """Return name -> mask as boolean [N, K], gathered from all ranks, on the CPU."""
        found = {}
        for name, parameter, transposed in self.masked():
            flags = whole(self.state[parameter]["flags"])
            found[name] = ((flags.T if transposed else flags) & _KEPT).bool().cpu().contiguous()
        return found

    @torch.no_grad()
    def write_(self) -> None:
        """Rewrite every masked parameter from its dense weight and mask, and the branch beside it."""
        branches: dict[str, dict[str, Tensor]] = {}
        for group in self.param_groups:
            for full_name, parameter in zip(group.get("branch", ()), group["params"], strict=False):  # none, or all
                name, _, part = full_name.rpartition(".")
                branches.setdefault(name, {})[part] = parameter
        for name, parameter, transposed in self.masked():
            self._write(name, parameter, transposed, branches.get(name, {}))

    @torch.no_grad()
    def catch_up_(self) -> None:
        """Take over what others wrote into branches since their last step; `rewrite` would write over it."""
        for group in self.param_groups:
            for parameter in group["params"] if "branch" in group else ():
                self._caught_up(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` gave; unlike in torch's optimizers each state keeps its own dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for key, value in state_dict["state"].get(number, {}).items():
                on_device = value.detach().to(parameter.device) if isinstance(value, Tensor) else value
                self.state[parameter][key] = on_device

    def masked(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Yield (name, parameter, whether it is transposed) of the masked parameters."""
        for group in self.param_groups:
            if group["masked"]:
                yield from zip(group["names"], group["params"], group["transposed"], strict=True)

    def _start(self, name: str, parameter: Tensor, transposed: bool) -> None:
        state = self.state[parameter]
        state["dense"] = parameter.detach().to(torch.float32, copy=True)
        state["flags"] = torch.zeros_like(parameter, dtype=torch.uint8)
        local = local_part(state["dense"])
        _refuse_cut_groups(name, parameter, transposed, self.pattern)
        if name in self._first_keep:
            keep = self._first_keep.pop(name)
            if broken := self.pattern.count_violations(keep):
                raise PatternError(
                    f"the mask of {name} breaks {self.pattern} in {broken} groups: start from a mask that obeys it, or "
                    "from a method by name, as 'sparsegpt'"
                )
            keep = _shard_like(keep.T if transposed else keep, parameter)
        else:
            keep = self._project(local.abs(), transposed)
        local_part(state["flags"]).copy_(keep.to(torch.uint8) * (_KEPT | _KEPT_AT_FIRST))

    def _project(self, scores: Tensor, transposed: bool) -> Tensor:
        if not scores.numel():
            return torch.zeros_like(scores, dtype=torch.bool)
        return self.pattern.project(scores.T).T if transposed else self.pattern.project(scores)

    def _write(self, name: str, parameter: Tensor, transposed: bool, branch: dict[str, Tensor]) -> None:
        state = self.state[parameter]
        keep = local_part(state["flags"]) & _KEPT
        kept = local_part(state["dense"]) * keep
        if self.rewrite is not None and kept.numel():
            kept, keep = (kept.T, keep.T) if transposed else (kept, keep)
            dense = {part: local_part(self._dense(beside)) for part, beside in branch.items()}
            kept, written = self.rewrite(name, kept, keep.bool(), dense)
            kept = kept.T if transposed else kept
            for part, values in written.items():
                local_part(branch[part].detach()).copy_(values)
        local_part(parameter.detach()).copy_(kept)

    def _dense(self, parameter: Tensor) -> Tensor:
        """Return the fp32 values that a plain parameter is written from; from now on it has them."""
        state = self.state[parameter]
        if "dense" not in state:
            state["dense"] = parameter.detach().to(torch.float32, copy=True)
        return state["dense"]

    def _caught_up(self, parameter: Tensor) -> Tensor:
        """Return this rank's part of the same, with what others wrote into the parameter since it was written."""
        dense, local = local_part(self._dense(parameter)), local_part(parameter.detach())
        return torch.where(dense.to(local.dtype) == local, dense, local.float(), out=dense)

    def _moments(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if "exp_avg" not in state:
            like = state.get("dense", parameter.detach())
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        return state

    def _step_plain(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        local, in_branch = local_part(parameter.detach()), "branch" in group
        if parameter.dtype.itemsize >= 4 and not in_branch:
            self._adam(group, parameter, local, gradient.to(local.dtype))
            return
        # Branches have their dense values from the first step on, though only `rewrite` needs them: a checkpoint of
        # sharded parameters can be read into states alone that a new optimizer has after one step.
        is_rewritten = in_branch and self.rewrite is not None
        dense = local_part(self._dense(parameter)) if is_rewritten else self._caught_up(parameter)
        self._adam(group, parameter, dense, gradient.float())
        local.copy_(dense)

    def _step_masked(self, group: dict[str, Any], parameter: Tensor, gradient: Tensor) -> None:
        weight, gradient = local_part(self.state[parameter]["dense"]), gradient.float()
        strength = self._lambda(parameter)
        self._lambdas.append(strength)
        if self.masked_decay_kind == "paper":
            self._adam_of_the_paper(group, parameter, weight, gradient, strength)
        elif self.masked_decay_kind == "gradient":
            self._adam(group, parameter, weight, gradient + strength * self._removed(parameter))
        else:
            self._adam(group, parameter, weight, gradient)
            weight.sub_(self._removed(parameter), alpha=group["lr"] * strength)

    def _adam(self, group: dict[str, Any], parameter: Tensor, weight: Tensor, gradient: Tensor) -> None:
        """Step one local weight in place. One at a time: a list would need all gradients in fp32 at once."""
        state = self._moments(parameter)
        if gradient.stride() != weight.stride():  # the fused kernel goes through memory in one order for all
            gradient = torch.empty_like(weight).copy_(gradient)
        adamw(
            [weight],
            [gradient],
            [local_part(state["exp_avg"])],
            [local_part(state["exp_avg_sq"])],
            [],
            [state["step"]],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _adam_of_the_paper(
        self, group: dict[str, Any], parameter: Tensor, weight: Tensor, gradient: Tensor, strength: float
    ) -> None:
        beta1, beta2 = group["betas"]
        state = self._moments(parameter)
        state["step"] += 1
        step = float(state["step"])
        mean, square = local_part(state["exp_avg"]), local_part(state["exp_avg_sq"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        mean.lerp_(gradient, 1 - beta1)
        update = mean / (1 - beta1**step) + strength * self._removed(parameter)
        square.mul_(beta2).addcmul_(update, update, value=1 - beta2)
        weight.addcdiv_(update, (square / (1 - beta2**step)).sqrt_().add_(group["eps"]), value=-group["lr"])

    def _removed(self, parameter: Tensor) -> Tensor:
        """Return (1 - m) W."""
        state = self.state[parameter]
        return local_part(state["dense"]) * (1 - (local_part(state["flags"]) & _KEPT))

    def _lambda(self, parameter: Tensor) -> float:
        if self.masked_decay is not None:
            return self.masked_decay
        state = self.state[parameter]
        if "exp_avg" not in state:
            return 0.0
        squares = [local_part(state[key]).double().square().sum() for key in ("exp_avg", "dense")]
        if (group := _process_group(parameter)) is not None:
            for square in squares:
                torch.distributed.all_reduce(square, group=group)
        mean, dense = (float(square) for square in squares)
        return self.follow * (mean / dense) ** 0.5 if dense > 0 else 0.0


def local_part(x: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, sharing its memory."""
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x: Tensor) -> Tensor:
    """Return a tensor put together from all ranks, which all must ask for where it is sharded."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def _process_group(parameter: Tensor) -> Any:
    """Return the ranks among which the parameter is sharded; None where each holds it all."""
    if isinstance(parameter, DTensor) and any(isinstance(placement, Shard) for placement in parameter.placements):
        return parameter.device_mesh.get_group(_shard_dimension(parameter))
    return None


def _shard_dimension(parameter: DTensor) -> int:
    """Return the dimension of the device mesh along which the parameter is sharded; the others hold copies."""
    sharded = [index for index, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    if len(sharded) > 1:
        raise Unsupported("a weight is sharded along two dimensions of the device mesh: shard it along one")
    return sharded[0]


def _shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    x = x.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return x
    return local_part(distribute_tensor(x.to(torch.uint8), parameter.device_mesh, parameter.placements))


def _refuse_cut_groups(name: str, parameter: Tensor, transposed: bool, pattern: NM) -> None:
    """Raise where sharding along in_features cuts a group of the pattern."""
    if not isinstance(parameter, DTensor):
        return
    along = 0 if transposed else 1
    cut = any(isinstance(placement, Shard) and placement.dim == along for placement in parameter.placements)
    if cut and -(-parameter.shape[along] // parameter.device_mesh.size(_shard_dimension(parameter))) % pattern.m:
        raise Unsupported(
            f"{name} is sharded along in_features, which cuts groups of {pattern}: use a number of processes that "
            f"divides {parameter.shape[along]} into multiples of {pattern.m}, or DDP"
        )
