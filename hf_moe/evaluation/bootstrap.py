"""Is one model better than another, or is it the sample? Both on the same examples, drawn again and again."""

from typing import Any

import numpy as np

from .measured import Measured

RESAMPLES = 2_000


def paired_bootstrap(first: Measured, other: Measured, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Any]:
    """How much `other` differs from `first` in its metric, by the paired bootstrap (Efron and Tibshirani 1993; for
    models, Koehn 2004): examples are drawn with replacement, the same for both.

    Returns:
        `difference` (other minus first), `interval` (95%, percentiles), `share_better` (of the resamples in which
        `other` is better, equal ones counting half), and what it was made of. Without a difference, and with a `note`,
        where the models were not asked the same.
    """
    made: dict[str, Any] = {"metric": first.metric, "greater_is_better": first.greater_is_better}
    if first.metric != other.metric or first.examples != other.examples:
        return made | {"note": "not compared: the models' examples or tokens differ"}
    count = len(first.records)
    every = np.arange(count)
    generator = np.random.default_rng(seed)
    differences = []
    for _ in range(resamples):
        rows = generator.integers(count, size=count)
        differences.append(other.statistic(rows) - first.statistic(rows))
    drawn = np.array(differences)
    drawn = drawn[~np.isnan(drawn)]  # a resample of one value alone has no correlation
    if len(drawn) == 0:
        return made | {"note": "not compared: the metric is not defined on these examples"}
    gains = drawn if first.greater_is_better else -drawn
    low, high = np.percentile(drawn, [2.5, 97.5])
    return made | {
        "difference": float(other.statistic(every) - first.statistic(every)),
        "interval": [float(low), float(high)],
        "share_better": float(((gains > 0) + 0.5 * (gains == 0)).mean()),
        "examples": count,
        "resamples": len(drawn),
        "seed": seed,
    }
