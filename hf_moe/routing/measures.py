"""How even the load of experts is, by the names the field uses. Each takes counts (L, E); NaN where a row is all 0."""

import math

import torch

DEAD_SHARE = 0.1  # an expert with less than this part of its fair share (1 / E) is called dead


def load(counts: torch.Tensor) -> torch.Tensor:
    """(L, E), float64: each expert's share of the layer's assignments; 1 / E everywhere is balance."""
    return counts.double() / counts.sum(1, keepdim=True)


def max_violation(counts: torch.Tensor) -> torch.Tensor:
    """(L,): the largest load over the mean load, minus 1; 0 is balance, E / K - 1 all tokens on the same K experts
    (MaxVio of Wang et al. 2024, arXiv 2408.15664, section 4.1)."""
    return load(counts).amax(1) * counts.shape[1] - 1


def variation(counts: torch.Tensor) -> torch.Tensor:
    """(L,): coefficient of variation, standard deviation over mean of the loads; 0 is balance (Shazeer et al. 2017,
    arXiv 1701.06538, section 4, who square it)."""
    return load(counts).std(1, correction=0) * counts.shape[1]


def entropy(counts: torch.Tensor) -> torch.Tensor:
    """(L,): of the load, in nats; log E is balance."""
    shares = load(counts)
    return -torch.xlogy(shares, shares).sum(1)


def normalised_entropy(counts: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(L,): 1 is balance, 0 all tokens on the same K experts, whose entropy is log K.

    (Entropy over log E, the usual form, calls top-2 routing over four experts half even when it has collapsed.)

    Args:
        tokens: (L,), how many made the assignments; K is their mean number.
    """
    chosen = (counts.sum(1) / tokens.double()).clamp(min=1.0)
    room = math.log(counts.shape[1]) - chosen.log()
    even = room < 1e-9  # every token visits every expert
    return torch.where(even, 1.0, (entropy(counts) - chosen.log()) / room.masked_fill(even, 1.0)).clamp(0.0, 1.0)


def dead(counts: torch.Tensor) -> torch.Tensor:
    """(L, E), bool: experts with less than a tenth (`DEAD_SHARE`) of their fair share 1 / E."""
    return load(counts) < DEAD_SHARE / counts.shape[1]
