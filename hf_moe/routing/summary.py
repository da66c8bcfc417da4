"""The figures of a report, as plain values: what is written to `routing.json` and drawn on the page."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .domains import Specialisation
from .stats import RoutingStats

PAIRS = 3  # of experts chosen together, by layer
TOKENS = 8  # of an expert
SELDOM = 5  # a token that came less often says nothing


def summarise(
    stats: RoutingStats,
    *,
    specialisation: Specialisation | None = None,
    similarity: Mapping[int, float] | None = None,
    name_of: Callable[[int], str] = str,
) -> dict[str, Any]:
    """Everything a report says of the routing.

    Args:
        specialisation: of the domains, where there are any.
        similarity: layer -> mean cosine between experts' weights.
        name_of: token id -> how it is shown.
    """
    measures = {
        "max_violation": stats.max_violation,
        "cv": stats.cv,
        "entropy": stats.entropy,
        "normalised_entropy": stats.normalised_entropy,
        "load": stats.load,
        "gate_mass": stats.gate_mass,
    }
    return {
        "num_experts": stats.num_experts,
        "tokens": int(stats.tokens.max()),
        "layers": [
            {
                "layer": layer,
                "tokens": int(stats.tokens[place]),
                **{name: values[place].tolist() for name, values in measures.items()},
                "dead_experts": stats.dead[place].nonzero().flatten().tolist(),
                "similarity": (similarity or {}).get(layer),
                "together": _pairs(stats, place),
                "tokens_of_experts": _tokens(stats, place, name_of),
            }
            for place, layer in enumerate(stats.layers)
        ],
        "domains": _domains(stats),
        "specialisation": None if specialisation is None else specialisation.to_json(),
    }


def _pairs(stats: RoutingStats, place: int) -> list[dict[str, Any]]:
    """The pairs of experts that are chosen together most, over what chance would do; none where a token visits one."""
    upper = torch.triu(stats.together[place], diagonal=1)
    if not upper.any():
        return []
    lift = stats.coactivation_lift[place]
    common = upper >= max(SELDOM, int(stats.tokens[place]) // 100)
    order = (lift.where(common, 0.0)).flatten().argsort(descending=True)[:PAIRS].tolist()
    pairs = [divmod(at, stats.num_experts) for at in order]
    return [
        {
            "experts": [one, other],
            "share": stats.coactivation[place, one, other].item(),
            "times_chance": lift[one, other].item(),
        }
        for one, other in pairs
        if common[one, other]
    ]


def _tokens(stats: RoutingStats, place: int, name_of: Callable[[int], str]) -> list[list[dict[str, Any]]]:
    """By expert, the tokens that it is sent most, over its load: [{token, text, count, times_load}]."""
    held = {token: counts[place] for token, counts in stats.table.counts.items() if counts[place].sum() >= SELDOM}
    if not held:
        return [[] for _ in range(stats.num_experts)]
    ids, counts_NE = list(held), torch.stack(list(held.values())).double()
    lift_NE = counts_NE / counts_NE.sum(1, keepdim=True) / stats.load[place].clamp(min=1e-9)
    found = []
    for expert in range(stats.num_experts):
        # of tokens that all go to it, the commonest
        score_N = lift_NE[:, expert] * counts_NE[:, expert].sqrt()
        order = score_N.argsort(descending=True)[:TOKENS].tolist()
        found.append(
            [
                {
                    "token": ids[at],
                    "text": name_of(ids[at]),
                    "count": int(counts_NE[at, expert]),
                    "times_load": lift_NE[at, expert].item(),
                }
                for at in order
                if lift_NE[at, expert] > 1
            ]
        )
    return found


def _domains(stats: RoutingStats) -> dict[str, Any]:
    """Domain -> by layer, each expert's share of its assignments."""
    return {
        name: {"load": (counts_LE.double() / counts_LE.sum(1, keepdim=True)).tolist()}
        for name, counts_LE in stats.domains.items()
    }
