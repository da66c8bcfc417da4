"""Sentence embeddings: cosines against scores, or whether each text finds its own."""

from typing import Any

import numpy as np

from .classification import pearson, spearman
from .measured import Measured, first_of

AT_ONCE = 512  # anchors compared with all positives


def measure_sentences(predictions: Any, labels: Any, prepared: Any, split: str) -> Measured:
    """From (N, sides, D) embeddings of length 1: anchor, positive and perhaps negative."""
    embedded = first_of(predictions).astype(np.float64)
    anchors, positives = embedded[:, 0], embedded[:, 1]
    cosines = (anchors * positives).sum(axis=1)
    records: list[dict[str, Any]] = [{"row": row, "cosine": cosine} for row, cosine in enumerate(cosines.tolist())]
    if prepared.report["scored"]:
        scores = np.asarray(labels, dtype=np.float64).reshape(-1)
        for record, score in zip(records, scores.tolist(), strict=True):
            record["score"] = score
        figures = {"spearman": spearman(cosines, scores), "pearson": pearson(cosines, scores)}
        return Measured(
            metrics={name: None if np.isnan(value) else value for name, value in figures.items()},
            records=records,
            metric="spearman",
            greater_is_better=True,
            statistic=lambda rows: spearman(cosines[rows], scores[rows]),
            examples=scores.tolist(),
            notes=["Correlations of the cosine with the score."],
        )
    ranks = own_ranks(anchors, positives)
    metrics: dict[str, float | None] = {"mrr": float((1 / ranks).mean()), "accuracy_at_1": float((ranks == 1).mean())}
    metrics["mean_cosine"] = float(cosines.mean())
    if embedded.shape[1] > 2:
        metrics["triplet_accuracy"] = float((cosines > (anchors * embedded[:, 2]).sum(axis=1)).mean())
    for record, rank in zip(records, ranks.tolist(), strict=True):
        record["rank"] = rank
    return Measured(
        metrics=metrics,
        records=records,
        metric="mrr",
        greater_is_better=True,
        statistic=lambda rows: float((1 / ranks[rows]).mean()),
        examples=len(ranks),
        notes=[f"Each anchor seeks its positive among all {len(ranks)} of the split; ties count against it."],
    )


def own_ranks(anchors: np.ndarray, positives: np.ndarray) -> np.ndarray:
    """(N,), the place of each anchor's own positive among all, 1 the best."""
    ranks = []
    for start in range(0, len(anchors), AT_ONCE):
        cosines = anchors[start : start + AT_ONCE] @ positives.T
        own = np.take_along_axis(cosines, np.arange(start, start + len(cosines))[:, None], axis=1)
        ranks.append((cosines >= own).sum(axis=1))
    return np.concatenate(ranks)
