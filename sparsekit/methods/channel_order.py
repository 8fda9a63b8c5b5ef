"""The order of input channels in which an N:M pattern has to remove least.

N of every M neighbours stay, so it costs where strong channels are neighbours, and next to nothing where they are among
weak ones. To find the best order is hard; this is what RIA does (Zhang et al., ICLR 2024, "channel permutation"):

1. Channels sorted by their total score are dealt to the G groups in serpentine order (0…G-1, G-1…0, …), so that each
   group gets one of the strongest and one of the weakest.
2. The channels of one position, G of them, are taken out and put back into the groups so that the retained score is
   largest: a linear assignment problem. In row r, group g gains max(0, s_rc - t_rg) from channel c, where t_rg is the
   n-th largest of the m - 1 scores that stayed in. That is (|s_rc - t_rg| + s_rc - t_rg) / 2, and as each c and g has
   its turn once, what is to be made largest is the sum of the L1 distances between s_c and t_g.

All positions are gone through once: a second time gains next to nothing.
"""

import torch
from torch import Tensor

from sparsekit.archs import Coupling
from sparsekit.errors import Unsupported
from sparsekit.patterns import NM

_GROUPS = 512
"""Groups that exchange channels among themselves, at most: an assignment costs the third power of their number."""


def coupled_order(coupling: Coupling, scores: Tensor, pattern: NM) -> Tensor | None:
    """Return the order of a coupling's channels, int64 [C], that retains the most of what its consumers score.

    Args:
        coupling: one that can be permuted.
        scores: [R, K], of all consumers, one below the other.
        pattern: what is kept.
    Returns:
        None where the order that they have is as good, or groups would reach over the ends of heads.
    """
    size, repeats = coupling.head_size, coupling.repeats
    heads = scores.view(len(scores), -1, repeats, size)
    if size % pattern.m and heads.shape[1] * repeats > 1:
        return None
    orders = [best_order(head.flatten(0, 1), pattern) for head in heads.unbind(1)]
    order = torch.cat([order + i * size for i, order in enumerate(orders)])
    return None if torch.equal(order, torch.arange(len(order), device=order.device)) else order


def retained(scores: Tensor, pattern: NM) -> float:
    """Return how much of the scores [R, C] the pattern keeps."""
    return float(scores.masked_fill(~pattern.project(scores), 0).sum(dtype=torch.float64))


def best_order(scores: Tensor, pattern: NM) -> Tensor:
    """Return an order of the channels that retains at least as much as the one they have.

    Args:
        scores: [R, C], not negative. Where C is no multiple of m, the channels of the last group stay there.
        pattern: what is kept.
    Returns:
        int64 [C]: the channel that comes to each place. Within a group channels ascend, and groups by their first.
    Raises:
        Unsupported: scipy is not installed.
    """
    C = scores.shape[1]
    identity = torch.arange(C, device=scores.device)
    whole = C // pattern.m * pattern.m
    if whole <= pattern.m:
        return identity
    groups = _dealt(scores[:, :whole].sum(dim=0), pattern.m)
    num_parts = -(-len(groups) // _GROUPS)
    for part in range(num_parts):
        groups[part::num_parts] = _exchanged(scores, groups[part::num_parts], pattern)
    groups = groups.sort(dim=1).values
    order = torch.cat((groups[groups[:, 0].argsort()].flatten(), identity[whole:]))
    return order if retained(scores[:, order], pattern) > retained(scores, pattern) else identity


def _dealt(totals: Tensor, m: int) -> Tensor:
    """Return channels [G, m], dealt to the groups from the strongest to the weakest, there and back."""
    rounds = totals.argsort(descending=True, stable=True).view(m, -1)
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.contiguous()


def _exchanged(scores: Tensor, groups: Tensor, pattern: NM) -> Tensor:
    """Return the groups [G, m] after an exchange at each position, none of which can lose."""
    for position in range(pattern.m):
        others = torch.cat((groups[:, :position], groups[:, position + 1 :]), dim=1)
        least_kept = scores[:, others].topk(pattern.n, dim=2).values[..., -1]
        distances = torch.cdist(least_kept.T.contiguous(), scores[:, groups[:, position]].T.contiguous(), p=1.0)
        groups[:, position] = groups[_assigned(distances), position]
    return groups


def _assigned(gains: Tensor) -> Tensor:
    """Return the column that each row of [G, G] gets; each once, the sum of gains largest."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise Unsupported("the order of channels is found with scipy: pip install scipy, or permute=False") from error
    return torch.from_numpy(linear_sum_assignment(gains.cpu().numpy(), maximize=True)[1]).to(gains.device)
