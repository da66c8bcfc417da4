"""What a task's measurement gives, whichever the task."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model on one split.

    Args:
        metrics: name -> figure; None where it has none (a correlation with a constant, say).
        records: one of each example, for `predictions.jsonl`.
        metric: the one that models are compared by.
        greater_is_better: of `metric`.
        statistic: `metric` on some of the examples, by their indices (one may come several times).
        examples: what makes two models comparable example by example: equal, or their examples are not the same.
        tables: what is more than a figure: confusion, report, reliability.
        notes: what a reader must know of the figures.
    """

    metrics: dict[str, float | None]
    records: list[dict[str, Any]]
    metric: str
    greater_is_better: bool
    statistic: Callable[[np.ndarray], float]
    examples: Any
    tables: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def first_of(arrays: Any) -> np.ndarray:
    """A head's logits; some heads give more than them."""
    return np.asarray(arrays[0] if isinstance(arrays, tuple | list) else arrays)
