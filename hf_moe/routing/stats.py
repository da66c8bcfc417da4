"""What routing comes to in numbers: gathered batch by batch, added up over processes, read as properties.

Letters in names: L mixture layers, T tokens, E experts, K slots a token has, P passages.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from . import measures
from .tokens import TokenTable

PASSAGES = 512  # of each domain that are kept one by one, for the permutation test
TOKENS_WRITTEN = 256  # of the token table, in JSON


@dataclass(eq=False)
class RoutingStats:
    """Counts of one or more passes over text. Memory does not grow with the text.

    Args:
        layers: the mixtures' indices in the model, L of them.
        num_experts: E.
        tokens: (L,), int64: real tokens seen; padding never counts.
        together: (L, E, E), int64: tokens sent to both experts; the diagonal is how many each was sent.
        gates: (L, E), float64: sum of the gates of what each was sent.
        domains: name -> (L, E), int64: assignments of its tokens.
        passages: name -> of its first passages (at most `PASSAGES`) each (L, E), int64.
        table: counts by token.
    """

    layers: tuple[int, ...]
    num_experts: int
    tokens: torch.Tensor = field(init=False)
    together: torch.Tensor = field(init=False)
    gates: torch.Tensor = field(init=False)
    domains: dict[str, torch.Tensor] = field(default_factory=dict)
    passages: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    table: TokenTable = field(default_factory=TokenTable)

    def __post_init__(self) -> None:
        L, E = len(self.layers), self.num_experts
        self.tokens = torch.zeros(L, dtype=torch.long)
        self.together = torch.zeros(L, E, E, dtype=torch.long)
        self.gates = torch.zeros(L, E, dtype=torch.float64)

    def update(
        self,
        choices: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        *,
        ids: torch.Tensor | None = None,
        rows: torch.Tensor | None = None,
        domain: str | None = None,
    ) -> None:
        """Adds what became of T tokens, padding left out already.

        Args:
            choices: layer -> (index (T, K), gates (T, K)); layers that were skipped (LayerDrop) are not in it. An
                index of E is an empty slot.
            ids: (T,), which tokens they are, for the token table.
            rows: (T,), which passage of this batch each is of, for the test over domains.
            domain: what they are of; None: of no domain.
        """
        hot = {layer: _one_hot(index_TK, self.num_experts) for layer, (index_TK, _) in choices.items()}
        for place, layer in enumerate(self.layers):
            if layer in choices:
                index_TK, gates_TK = (values.cpu() for values in choices[layer])
                self.tokens[place] += len(index_TK)
                self.together[place] += (hot[layer].T @ hot[layer]).long()
                padded = torch.zeros(self.num_experts + 1, dtype=torch.float64)
                padded.index_add_(0, index_TK.flatten(), gates_TK.double().flatten())
                self.gates[place] += padded[:-1]
        if not hot or (ids is None and domain is None):
            return
        nothing = torch.zeros_like(next(iter(hot.values())))
        hot_LTE = torch.stack([hot.get(layer, nothing) for layer in self.layers])
        if ids is not None:
            self.table.add(ids.cpu(), hot_LTE)
        if domain is not None:
            self._add_domain(domain, hot_LTE, rows)

    def _add_domain(self, domain: str, hot_LTE: torch.Tensor, rows: torch.Tensor | None) -> None:
        self.domains[domain] = self.domains.get(domain, 0) + hot_LTE.sum(1).long()
        held = self.passages.setdefault(domain, [])
        for row in rows.cpu().unique().tolist() if rows is not None else ():
            if len(held) < PASSAGES:
                held.append(hot_LTE[:, rows.cpu() == row].sum(1).long())  # type: ignore[union-attr]

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        """Both together, as of two processes. ValueError where they are of different models."""
        if (self.layers, self.num_experts) != (other.layers, other.num_experts):
            raise ValueError("Statistics of models with other layers or experts can't be added.")
        total = RoutingStats(self.layers, self.num_experts)
        for stats in (self, other):
            total.tokens += stats.tokens
            total.together += stats.together
            total.gates += stats.gates
            total.table.merge(stats.table)
            for domain, counts_LE in stats.domains.items():
                total.domains[domain] = total.domains.get(domain, 0) + counts_LE
                held = total.passages.get(domain, []) + stats.passages.get(domain, [])
                total.passages[domain] = held[:PASSAGES]
        return total

    @property
    def counts(self) -> torch.Tensor:
        """(L, E), int64: tokens that each expert was sent."""
        return self.together.diagonal(dim1=1, dim2=2)

    @property
    def load(self) -> torch.Tensor:
        """(L, E), as in `measures`; NaN in a layer that made no assignment, as is every measure of it."""
        return measures.load(self.counts)

    @property
    def gate_mass(self) -> torch.Tensor:
        """(L, E), float64: share of the layer's gates, which is what each expert has to say."""
        return self.gates / self.gates.sum(1, keepdim=True)

    @property
    def max_violation(self) -> torch.Tensor:
        """(L,), as in `measures`."""
        return measures.max_violation(self.counts)

    @property
    def cv(self) -> torch.Tensor:
        """(L,): coefficient of variation, as in `measures`."""
        return measures.variation(self.counts)

    @property
    def entropy(self) -> torch.Tensor:
        """(L,), nats, as in `measures`."""
        return measures.entropy(self.counts)

    @property
    def normalised_entropy(self) -> torch.Tensor:
        """(L,), as in `measures`."""
        return measures.normalised_entropy(self.counts, self.tokens)

    @property
    def dead(self) -> torch.Tensor:
        """(L, E), bool, as in `measures`."""
        return measures.dead(self.counts)

    @property
    def coactivation(self) -> torch.Tensor:
        """(L, E, E): share of the tokens that are sent to both; the diagonal is sent to the one."""
        return self.together / self.tokens[:, None, None].double()

    @property
    def coactivation_lift(self) -> torch.Tensor:
        """(L, E, E): how often two experts are chosen together, over how often they would be if a token's choices had
        nothing to do with each other but that they differ: the pairs are dealt by the experts' loads."""
        apart = 1 - torch.eye(self.num_experts, dtype=torch.float64)
        pairs = self.together * apart
        expected = self.load[:, :, None] * self.load[:, None, :] * apart
        shares = pairs / pairs.sum((1, 2), keepdim=True)
        return shares / (expected / expected.sum((1, 2), keepdim=True))

    def to_json(self, *, passages: bool = True) -> dict[str, Any]:
        """What `from_json` reads, in plain lists; of the token table the commonest tokens.

        Args:
            passages: whether each passage's counts are in it, which only the permutation test needs.
        """
        return {
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "tokens": self.tokens.tolist(),
            "together": self.together.tolist(),
            "gates": self.gates.tolist(),
            "domains": {name: counts_LE.tolist() for name, counts_LE in self.domains.items()},
            "passages": {name: [held.tolist() for held in some] for name, some in self.passages.items()}
            if passages
            else {},
            "token_table": {
                str(token): counts_LE.tolist() for token, counts_LE in self.table.commonest(TOKENS_WRITTEN).items()
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RoutingStats":
        """Raises KeyError where it is not what `to_json` writes."""
        stats = cls(tuple(values["layers"]), values["num_experts"])
        stats.tokens = torch.tensor(values["tokens"], dtype=torch.long)
        stats.together = torch.tensor(values["together"], dtype=torch.long)
        stats.gates = torch.tensor(values["gates"], dtype=torch.float64)
        stats.domains = {name: torch.tensor(counts) for name, counts in values["domains"].items()}
        stats.passages = {name: [torch.tensor(held) for held in some] for name, some in values["passages"].items()}
        stats.table = TokenTable({int(token): torch.tensor(held) for token, held in values["token_table"].items()})
        return stats


def _one_hot(index_TK: torch.Tensor, experts: int) -> torch.Tensor:
    """(T, E), float64; empty slots (index E) are in no column."""
    hot = torch.zeros(len(index_TK), experts + 1, dtype=torch.float64)
    return hot.scatter_(1, index_TK.cpu(), 1.0)[:, :-1]
