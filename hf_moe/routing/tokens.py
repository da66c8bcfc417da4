"""Which tokens each expert is sent: the commonest ones, in bounded memory."""

from dataclasses import dataclass, field

import torch

CAPACITY = 4_096  # tokens counted at a time


@dataclass
class TokenTable:
    """Counts by token, layer and expert of the commonest tokens.

    Exact while no more than `CAPACITY` distinct tokens come; then the rarest half is forgotten, and one that comes
    back counts from 0 (as in lossy counting, Manku and Motwani 2002, section 4.2), so that counts are never too high.

    Args:
        counts: token id -> (L, E), int64.
    """

    counts: dict[int, torch.Tensor] = field(default_factory=dict)

    def add(self, ids_T: torch.Tensor, hot_LTE: torch.Tensor) -> None:
        """`ids_T` (T,) token ids; `hot_LTE` (L, T, E) 1 where a token is sent to an expert."""
        ids_U, place_T = ids_T.unique(return_inverse=True)
        layers, _, experts = hot_LTE.shape
        added_ULE = torch.zeros(len(ids_U), layers, experts, dtype=torch.long)
        added_ULE.index_add_(0, place_T, hot_LTE.transpose(0, 1).long())
        self._merge(dict(zip(ids_U.tolist(), added_ULE, strict=True)))

    def merge(self, other: "TokenTable") -> None:
        self._merge(other.counts)

    def _merge(self, added: dict[int, torch.Tensor]) -> None:
        for token, counts_LE in added.items():
            held = self.counts.get(token)
            self.counts[token] = counts_LE.clone() if held is None else held + counts_LE
        if len(self.counts) > CAPACITY:
            self.counts = self.commonest(CAPACITY // 2)

    def commonest(self, count: int) -> dict[int, torch.Tensor]:
        """The `count` tokens that came most often; of equals, the smaller id."""
        order = sorted(self.counts, key=lambda token: (-int(self.counts[token].sum()), token))
        return {token: self.counts[token] for token in order[:count]}
