"""Do experts specialise by domain? How much a token's domain tells of its expert, against shuffled labels.

Letters in names: N permutations, P passages, S domains (subjects), L layers, E experts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .stats import RoutingStats

PERMUTATIONS = 999
AT_ONCE = 64  # permutations in memory


@dataclass(frozen=True)
class Specialisation:
    """Mutual information of domain and expert, by layer, and how it compares with labels dealt anew.

    Args:
        layers: the mixtures' indices in the model.
        passages: domain -> how many passages were tested.
        information: by layer, nats; 0: the domain tells nothing of the expert, at most min(log S, log E).
        by_chance: by layer, mean over the shuffles: what few passages alone would show.
        p_values: by layer, (1 + shuffles that show as much) / (1 + shuffles); None where none can be given.
        p_value: of the sum over layers, one test for the whole model.
        permutations: how many shuffles.
        note: why there is no p-value; "" where there is.
    """

    layers: tuple[int, ...]
    passages: dict[str, int]
    information: tuple[float, ...]
    by_chance: tuple[float, ...] | None = None
    p_values: tuple[float, ...] | None = None
    p_value: float | None = None
    permutations: int = 0
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()}


def information(counts: torch.Tensor) -> torch.Tensor:
    """(…, S, E) counts -> (…), nats: mutual information of row and column."""
    joint = counts.double() / counts.sum((-2, -1), keepdim=True)
    expected = joint.sum(-1, keepdim=True) * joint.sum(-2, keepdim=True)
    return torch.xlogy(joint, joint / expected.where(expected > 0, 1.0)).sum((-2, -1)).clamp(min=0.0)


def specialise(stats: RoutingStats, *, permutations: int = PERMUTATIONS, seed: int = 0) -> Specialisation:
    """Permutation test of independence over the passages that `stats` holds one by one.

    Labels are shuffled over passages, not tokens: a passage's tokens are of one text and are no independent
    witnesses (Good 2005, "Permutation, Parametric and Bootstrap Tests of Hypotheses", 3rd edition, chapter 3). One
    shuffle serves all layers.

    Args:
        permutations: shuffles; 999 can show p = 0.001.
        seed: of the shuffles.

    Raises:
        ValueError: where there are fewer than two domains with passages.
    """
    counts_PLE, label_P, names = _passages(stats)
    observed = information(_by_domain(counts_PLE, label_P[None], len(names)))[0]
    sizes = {name: int((label_P == place).sum()) for place, name in enumerate(names)}
    alone = [name for name, size in sizes.items() if size < 2]
    if alone:
        note = f"{alone[0]} has one passage, so no significance can be given; two are the least, twenty are better."
        return Specialisation(stats.layers, sizes, tuple(observed.tolist()), note=note)
    shuffled_NL = _shuffled(counts_PLE, label_P, len(names), permutations, seed)
    as_much = shuffled_NL >= observed - 1e-12
    in_sum = shuffled_NL.sum(1) >= observed.sum() - 1e-12
    return Specialisation(
        layers=stats.layers,
        passages=sizes,
        information=tuple(observed.tolist()),
        by_chance=tuple(shuffled_NL.mean(0).tolist()),
        p_values=tuple((1 + count) / (1 + permutations) for count in as_much.sum(0).tolist()),
        p_value=(1 + int(in_sum.sum())) / (1 + permutations),
        permutations=permutations,
    )


def _passages(stats: RoutingStats) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(P, L, E), float64; (P,) domain of each; the domains' names."""
    held: Mapping[str, list[torch.Tensor]] = {name: some for name, some in stats.passages.items() if some}
    if len(held) < 2:
        raise ValueError("Specialisation compares domains, so it needs at least two with passages.")
    counts = torch.stack([passage for some in held.values() for passage in some]).double()
    labels = torch.tensor([place for place, some in enumerate(held.values()) for _ in some])
    return counts, labels, list(held)


def _shuffled(
    counts_PLE: torch.Tensor, label_P: torch.Tensor, domains: int, permutations: int, seed: int
) -> torch.Tensor:
    """(N, L): the information that shuffled labels show."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, permutations, AT_ONCE):
        count = min(AT_ONCE, permutations - start)
        order_NP = torch.rand(count, len(label_P), generator=generator, dtype=torch.float64).argsort(1)
        found.append(information(_by_domain(counts_PLE, label_P[order_NP], domains)))
    return torch.cat(found)


def _by_domain(counts_PLE: torch.Tensor, label_NP: torch.Tensor, domains: int) -> torch.Tensor:
    """(N, L, S, E): each domain's counts, by each row of labels."""
    hot_NSP = torch.nn.functional.one_hot(label_NP, domains).transpose(1, 2).double()
    return torch.einsum("nsp,ple->nlse", hot_NSP, counts_PLE)
