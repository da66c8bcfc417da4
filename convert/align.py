"""Which neurons of two networks are the same, and which experts of a layer are alike.

A network is the same function in any order of its neurons, so weights are compared, and averaged, only after one
network's neurons are put in the order of the other's (Git Re-Basin: Ainsworth et al. 2022, arXiv 2209.04836,
section 3.2). Experts are then grouped by what is left between them (M-SMoE: Li et al. 2023, arXiv 2310.01334).

Letters: F neurons, N features of a neuron, U units to be grouped.
"""

from collections.abc import Callable, Iterable

import torch
from scipy.optimize import linear_sum_assignment

# A matrix or bias by neuron: role, kind -> (F, N). The down projection's bias belongs to none.
Rows = Callable[[str, str], torch.Tensor]


def by_neuron(weight: torch.Tensor, role: str) -> torch.Tensor:
    """A projection (out, in), or a bias (out,), as one row a neuron."""
    return weight[:, None] if weight.ndim == 1 else (weight.T if role == "down" else weight)


def find_order(reference: Rows, other: Rows, held: Iterable[tuple[str, str]]) -> torch.Tensor | None:
    """(F,): which neuron of `other` stands for each of `reference`, so that their squared distance is smallest.

    None where that is the order they have. `held` are the (role, kind) that have rows. Where every neuron's nearest
    is another's, that is the answer; only else the assignment is solved, in time F³.
    """
    apart_FF: torch.Tensor | None = None
    for role, kind in held:
        one, two = reference(role, kind).float(), other(role, kind).float()
        squares = one.square().sum(1)[:, None] + two.square().sum(1)[None, :] - 2 * one @ two.T
        apart_FF = squares if apart_FF is None else apart_FF.add_(squares)
    assert apart_FF is not None
    nearest_F = apart_FF.argmin(dim=1)
    if len(nearest_F.unique()) < len(nearest_F):
        nearest_F = torch.from_numpy(linear_sum_assignment(apart_FF.numpy())[1])
    return None if torch.equal(nearest_F, torch.arange(len(nearest_F))) else nearest_F


def group(apart_UU: torch.Tensor, weight_U: torch.Tensor, number: int) -> list[list[int]]:
    """Groups of units, so that averages (weighted) lie close to what they stand for: the two whose union adds least to
    the squared distance are joined, until `number` are left (Ward 1963). Equals are joined lightest first.

    Args:
        apart_UU: squared distances.

    Returns:
        Groups by their first member, each with its heaviest member first.
    """
    apart_UU, weight_U, own_U = apart_UU.double().clone(), weight_U.double().clone(), weight_U
    groups = [[unit] for unit in range(len(weight_U))]
    while len(groups) > number:
        sums = weight_U[:, None] + weight_U[None, :]
        cost = apart_UU * weight_U[:, None] * weight_U[None, :] / sums
        above = torch.ones_like(cost).triu(1) > 0
        candidates = above & (cost == cost[above].min())
        first, second = divmod(int(sums.where(candidates, torch.inf).argmin()), len(groups))
        share = (weight_U[[first, second]] / weight_U[[first, second]].sum())[:, None]
        centre = (share * apart_UU[[first, second]]).sum(0) - share.prod() * apart_UU[first, second]
        apart_UU[first] = apart_UU[:, first] = centre.clamp(min=0)
        apart_UU[first, first] = 0
        weight_U[first] += weight_U[second]
        groups[first] += groups.pop(second)
        left = torch.arange(len(weight_U)) != second
        apart_UU, weight_U = apart_UU[left][:, left], weight_U[left]
    return [sorted(members, key=lambda unit: (-float(own_U[unit]), unit)) for members in groups]
