"""Gates on the units of a model, drawn so that their number has a gradient (hard concrete, arXiv 1712.01312).

Each unit has one number, its log-alpha. In training its gate is a draw, stretched beyond 0 and 1 and clipped:

    z = clip(v (hi - lo) + lo, 0, 1),   v = sigmoid((ln u - ln(1 - u) + alpha) / beta),   u ~ U(0, 1)
    P(z > 0) = sigmoid(alpha - beta ln(-lo / hi))

with lo = -0.1, hi = 1.1 and beta = 2/3, as NutePrune has them (arXiv 2402.09773). Without the draw (`stochastic=False`)
a gate is what u = 1/2 gives, its count goes with v itself, and where it is clipped it keeps the gradient of v: for
without noise a gate that is 0 or 1 would stay so for ever.

The log-alphas of all units are one vector, so that a step is a few operations however many layers there are.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparsekit.archs import Width, find_blocks, find_widths
from sparsekit.methods.structured.slicegpt import Stream
from sparsekit.plan import Cut
from sparsekit.registry import unknown

Masks = dict[str, Tensor]
"""Name of a part -> [num_units], what each unit is multiplied by. Names are the keys of `Plan.cuts`: the layer that
reads heads or channels, the input embedding for the dimensions of the residual stream, a list of blocks for layers."""

KINDS = ("heads", "channels", "hidden", "layers")

LOW, HIGH, BETA, EPS = -0.1, 1.1, 2 / 3, 1e-6
LIMIT = math.log(100)
"""Log-alphas stay within plus and minus this."""
OPEN = math.log(0.99 / 0.01)
"""Log-alpha that all gates begin with: the chance to be open is 0.998."""


class Gates(nn.Module):
    """Log-alphas of the units of a model.

    Made by `Gates.of`. Always fp32, whatever dtype the module is cast to.

    Attributes:
        log_alpha: parameter, fp32 [all units]; `split` gives it by name.
        excess: buffer, fp32 [all units]: how far beyond the limits log-alphas would have gone, in sum. Together they
            rank units whose log-alphas lie at the limit alike; see `shadow`.
        sizes: name -> number of units, in the order of the vector.
        kinds: name -> kind of its units.
        widths: heads and channels that have gates.
        stream: who writes to the residual stream, if its dimensions have gates.
        layers: list of blocks -> names of its blocks, if layers have gates.
        stochastic: whether `sample` draws.
    """

    log_alpha: nn.Parameter
    excess: Tensor

    def __init__(
        self,
        widths: list[Width],
        *,
        stream: Stream | None = None,
        hidden_size: int = 0,
        layers: Mapping[str, list[str]] | None = None,
        stochastic: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__()
        self.widths, self.stream, self.layers, self.stochastic = widths, stream, dict(layers or {}), stochastic
        parts = [(width.name, width.kind, width.num_units) for width in widths]
        parts += [] if stream is None else [(stream.embedding, "hidden", hidden_size)]
        parts += [(name, "layers", len(blocks)) for name, blocks in self.layers.items()]
        self.kinds = {name: kind for name, kind, _ in parts}
        self.sizes = {name: size for name, _, size in parts}
        self.log_alpha = nn.Parameter(torch.full((sum(self.sizes.values()),), OPEN, dtype=torch.float32, device=device))
        self.register_buffer("excess", torch.zeros_like(self.log_alpha.detach()))

    @classmethod
    def of(
        cls,
        model: nn.Module,
        kinds: Collection[str] = ("heads", "channels"),
        *,
        widths: list[Width] | None = None,
        stochastic: bool = True,
    ) -> "Gates":
        """Return open gates for a model, on its device.

        Args:
            model: dense, and without adapters yet.
            kinds: of `KINDS`; at least one of heads and channels. "hidden" is one gate for each dimension of the
                residual stream, "layers" one for each block.
            widths: the heads and channels that may go; those of the model's that are of `kinds` if None.
            stochastic: draw gates in training, or let them be what u = 1/2 gives.
        Raises:
            ValueError: a kind is unknown or missing.
            Unsupported: the model's heads, channels or residual stream are not known.
        """
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(unknown("kind of units", kind, list(KINDS)))
        found = find_widths(model) if widths is None else widths
        chosen = [width for width in found if width.kind in kinds]
        if not chosen:
            raise ValueError(f"kinds={tuple(kinds)} leaves no heads and no channels to put gates on: add one of these")
        stream = Stream.of(model) if "hidden" in kinds else None
        table = None if stream is None else model.get_submodule(stream.embedding).get_parameter("weight")
        return cls(
            chosen,
            stream=stream,
            hidden_size=0 if table is None else table.shape[1],
            layers=find_blocks(model, [width.name for width in chosen]) if "layers" in kinds else None,
            stochastic=stochastic,
            device=next(model.parameters()).device,
        )

    @property
    def names(self) -> list[str]:
        """Names of the parts that have gates."""
        return list(self.sizes)

    def split(self, units: Tensor) -> Masks:
        """Return a vector [all units] by name; views."""
        return dict(zip(self.sizes, units.split(list(self.sizes.values())), strict=True))

    def sample(self, generator: torch.Generator | None = None) -> Masks:
        """Return gates in [0, 1], fp32, differentiable; the same for all sequences of a batch.

        Args:
            generator: of the draw, on any device; torch's own for the gates' device if None. Gates that are not
                stochastic need none.
        """
        if not self.stochastic:
            value = torch.sigmoid(self.log_alpha / BETA)
            stretched = value * (HIGH - LOW) + LOW
            return self.split(stretched + (stretched.clamp(0, 1) - stretched).detach())
        device = self.log_alpha.device if generator is None else generator.device
        u = torch.rand(len(self.log_alpha), generator=generator, device=device).to(self.log_alpha.device)
        noise = torch.logit(u * (1 - 2 * EPS) + EPS)
        value = torch.sigmoid((noise + self.log_alpha) / BETA)
        return self.split((value * (HIGH - LOW) + LOW).clamp(0, 1))

    def p_open(self) -> dict[str, Tensor]:
        """Return how much each unit counts, fp32 in [1e-6, 1 - 1e-6], differentiable.

        The chance that its gate is above 0; of gates that are not stochastic, sigmoid(alpha / beta).
        """
        return self.split(self.chance(self.log_alpha))

    def chance(self, log_alpha: Tensor) -> Tensor:
        """Return how much units with these log-alphas count; see `p_open`."""
        shifted = log_alpha - BETA * math.log(-LOW / HIGH) if self.stochastic else log_alpha / BETA
        return torch.sigmoid(shifted).clamp(EPS, 1 - EPS)

    @torch.no_grad()
    def paper_masks(self) -> Masks:
        """Return the paper's deterministic masks, fp32: of each part the round(sum (1 - P)) units of least log-alpha
        are 0, the others sigmoid(0.8 alpha / beta), which is 0.996 at most."""
        masks = {}
        for (name, alpha), p_open in zip(self.split(self.log_alpha).items(), self.p_open().values(), strict=True):
            num_closed = round(float((1 - p_open.double()).sum()))
            closed = alpha.sort(stable=True).indices[:num_closed]
            masks[name] = torch.sigmoid(0.8 * alpha / BETA).index_fill(0, closed, 0.0)
        return masks

    def shadow(self) -> dict[str, Tensor]:
        """Return what log-alphas would be had they no limits, fp32."""
        return self.split(self.log_alpha.detach() + self.excess)

    @torch.no_grad()
    def start_from_(self, masks: Masks) -> None:
        """Begin anew: open and closed as these boolean masks, parts that are missing open, but free to change.

        What counts as closed is nearly so: gates that are drawn are open with a chance of 8 %, others count 5 %.
        """
        near = 4.0 if self.stochastic else 2.0
        alpha = {
            name: torch.where(masks[name].cpu(), near, -near) if name in masks else torch.full((size,), OPEN)
            for name, size in self.sizes.items()
        }
        self.log_alpha.copy_(torch.cat(list(alpha.values())).clamp(-LIMIT, LIMIT))
        self.excess.zero_()

    @torch.no_grad()
    def clamp_(self) -> None:
        """Put log-alphas back within their limits; after each step of the optimizer."""
        inside = self.log_alpha.clamp(-LIMIT, LIMIT)
        self.excess += self.log_alpha - inside
        self.log_alpha.copy_(inside)

    def cuts(self, masks: Masks) -> dict[str, Cut]:
        """Return masks as cuts of a plan; parts of which all is left are missing.

        Layers come first, and heads and channels have the names that they have in the model without the layers that
        went, as `Plan.cuts` has it.

        Args:
            masks: a unit stays if its mask is above 0; a layer that goes takes its heads and channels with it.
        Raises:
            ValueError: nothing is left of a part.
        """
        cuts: dict[str, Cut] = {}
        renamed = {name: name for name in masks}
        for name, blocks in self.layers.items():
            left = (masks[name] > 0).nonzero().flatten().tolist()
            places = {blocks[index]: f"{name}.{place}" for place, index in enumerate(left)}
            for part in masks:
                for block in blocks:
                    if part.startswith(f"{block}."):
                        renamed[part] = places[block] + part.removeprefix(block) if block in places else ""
        for name, mask in sorted(masks.items(), key=lambda each: self.kinds[each[0]] != "layers"):
            kept = (mask > 0).nonzero().flatten().cpu()
            if renamed[name] and len(kept) < len(mask):
                cuts[renamed[name]] = Cut(kept, len(mask), self.kinds[name])
        return cuts

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but not to another dtype: a step of the optimizer would be lost in rounding."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)
