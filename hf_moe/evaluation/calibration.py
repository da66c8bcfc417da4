"""How far probabilities can be believed."""

from typing import Any

import numpy as np

BINS = 15  # of equal width
TINY = 1e-12


def softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    shifted = np.asarray(logits, dtype=np.float64)
    powers = np.exp(shifted - shifted.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def calibration(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """NLL (nats), Brier score (sum over the classes, between 0 and 2) and ECE of the predicted class.

    Args:
        probabilities: (N, C).
        labels: (N,), the true classes.
    """
    rows = np.arange(len(labels))
    truth = np.zeros_like(probabilities)
    truth[rows, labels] = 1
    predicted = probabilities.argmax(axis=1)
    bins = reliability(probabilities.max(axis=1), predicted == labels)
    return {
        "nll": float(-np.log(np.maximum(probabilities[rows, labels], TINY)).mean()),
        "brier": float(((probabilities - truth) ** 2).sum(axis=1).mean()),
        "ece": expected_calibration_error(bins),
    }


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[dict[str, Any]]:
    """`BINS` bins of equal width: how many examples, their mean confidence, and how many of them are right.

    A confidence on a bin's upper edge is in it (Guo et al. 2017, arXiv 1706.04599).
    """
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    bins = []
    for number in range(BINS):
        held = place == number
        count = int(held.sum())
        bins.append(
            {
                "from": number / BINS,
                "to": (number + 1) / BINS,
                "count": count,
                "confidence": float(confidence[held].mean()) if count else None,
                "accuracy": float(correct[held].mean()) if count else None,
            }
        )
    return bins


def expected_calibration_error(bins: list[dict[str, Any]]) -> float:
    """Mean distance of confidence and accuracy, over the examples."""
    total = sum(entry["count"] for entry in bins)
    gaps = [entry["count"] * abs(entry["confidence"] - entry["accuracy"]) for entry in bins if entry["count"]]
    return float(sum(gaps) / total)
