"""Text classification: right or wrong, class by class, and how sure."""

import warnings
from typing import Any

import numpy as np
from scipy import stats

from .calibration import TINY, calibration, expected_calibration_error, reliability, softmax
from .measured import Measured, first_of


def measure_classification(predictions: Any, labels: Any, prepared: Any, split: str) -> Measured:
    """By the problem's type."""
    logits, truth = first_of(predictions), np.asarray(labels)
    if prepared.problem_type == "regression":
        return _regression(logits.reshape(len(truth)).astype(np.float64), truth.reshape(-1).astype(np.float64))
    if prepared.problem_type == "multi_label_classification":
        return _multi_label(logits, truth.astype(int), prepared.labels)
    return _single_label(softmax(logits), truth.astype(int), prepared.labels)


def f1_by_class(truth: np.ndarray, predicted: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """F1 of each of `classes`; 0 where it is neither there nor predicted."""
    size = int(max(truth.max(), predicted.max(), classes.max())) + 1
    right = np.bincount(truth[truth == predicted], minlength=size)
    both = np.bincount(truth, minlength=size) + np.bincount(predicted, minlength=size)
    return (2 * right / np.maximum(both, 1))[classes]


def _single_label(probabilities: np.ndarray, truth: np.ndarray, names: list[str]) -> Measured:
    from sklearn import metrics

    predicted = probabilities.argmax(axis=1)
    classes = np.unique(truth)  # a class that is not there has no F1 to be averaged
    accuracy = float((predicted == truth).mean())
    numbers = list(range(len(names)))
    with warnings.catch_warnings():  # one class alone has no correlation
        warnings.simplefilter("ignore")
        report = metrics.classification_report(
            truth, predicted, labels=numbers, target_names=names, output_dict=True, zero_division=0
        )
        matthews = float(metrics.matthews_corrcoef(truth, predicted))

    def statistic(rows: np.ndarray) -> float:
        return float(f1_by_class(truth[rows], predicted[rows], classes).mean())

    return Measured(
        metrics={
            "accuracy": accuracy,
            "f1_macro": statistic(np.arange(len(truth))),
            "f1_micro": accuracy,
            "matthews": matthews,
            **calibration(probabilities, truth),
            "majority_accuracy": float(np.bincount(truth).max() / len(truth)),
        },
        records=[
            {"row": row, "label": names[label], "prediction": names[guess], "probabilities": own}
            for row, (label, guess, own) in enumerate(
                zip(truth.tolist(), predicted.tolist(), probabilities.round(6).tolist(), strict=True)
            )
        ],
        metric="f1_macro",
        greater_is_better=True,
        statistic=statistic,
        examples=[names[label] for label in truth.tolist()],
        tables={
            "classification_report": report,
            "confusion_matrix": metrics.confusion_matrix(truth, predicted, labels=numbers).tolist(),
            "reliability": reliability(probabilities.max(axis=1), predicted == truth),
        },
        notes=["f1_macro is over the classes that occur; f1_micro of a single label is its accuracy."],
    )


def _multi_label(logits: np.ndarray, truth: np.ndarray, names: list[str]) -> Measured:
    from sklearn import metrics

    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    predicted = (probabilities > 0.5).astype(int)
    occur = truth.sum(axis=0) > 0

    def statistic(rows: np.ndarray) -> float:
        right = (truth[rows] & predicted[rows]).sum(axis=0)
        both = truth[rows].sum(axis=0) + predicted[rows].sum(axis=0)
        return float((2 * right / np.maximum(both, 1))[occur].mean()) if occur.any() else 0.0

    right, both = int((truth & predicted).sum()), int(truth.sum() + predicted.sum())
    said = np.where(truth == 1, probabilities, 1 - probabilities)
    numbers = list(range(len(names)))
    report = metrics.classification_report(
        truth, predicted, labels=numbers, target_names=names, output_dict=True, zero_division=0
    )
    confusion = metrics.multilabel_confusion_matrix(truth, predicted, labels=numbers).tolist()
    bins = reliability(probabilities.reshape(-1), truth.reshape(-1) == 1)
    return Measured(
        metrics={
            "accuracy": float((predicted == truth).all(axis=1).mean()),
            "f1_macro": statistic(np.arange(len(truth))),
            "f1_micro": 2 * right / max(1, both),
            "nll": float(-np.log(np.maximum(said, TINY)).mean()),
            "brier": float(((probabilities - truth) ** 2).mean()),
            "ece": expected_calibration_error(bins),
        },
        records=[
            {"row": row, "labels": _chosen(own, names), "predictions": _chosen(guess, names), "probabilities": sure}
            for row, (own, guess, sure) in enumerate(
                zip(truth.tolist(), predicted.tolist(), probabilities.round(6).tolist(), strict=True)
            )
        ],
        metric="f1_macro",
        greater_is_better=True,
        statistic=statistic,
        examples=[sorted(name for name, own in zip(names, row, strict=True) if own) for row in truth],
        tables={
            "classification_report": report,
            "confusion_by_label": dict(zip(names, confusion, strict=True)),
            "reliability": bins,
        },
        notes=[
            "A label is predicted above 0.5. accuracy: all labels of a row are right; nll, brier and ece are by label."
        ],
    )


def _chosen(row: list[int], names: list[str]) -> list[str]:
    return [name for name, chosen in zip(names, row, strict=True) if chosen]


def _regression(predicted: np.ndarray, truth: np.ndarray) -> Measured:
    def statistic(rows: np.ndarray) -> float:
        return pearson(predicted[rows], truth[rows])

    return Measured(
        metrics={
            "pearson": _figure(pearson(predicted, truth)),
            "spearman": _figure(spearman(predicted, truth)),
            "mse": float(((predicted - truth) ** 2).mean()),
            "mae": float(np.abs(predicted - truth).mean()),
            "mean_mse": float(truth.var()),
        },
        records=[
            {"row": row, "label": label, "prediction": guess}
            for row, (label, guess) in enumerate(zip(truth.tolist(), predicted.tolist(), strict=True))
        ],
        metric="pearson",
        greater_is_better=True,
        statistic=statistic,
        examples=truth.tolist(),
        notes=["mean_mse is that of always saying the mean."],
    )


def pearson(one: np.ndarray, other: np.ndarray) -> float:
    """NaN where one of them is constant."""
    if len(one) < 2 or np.ptp(one) == 0 or np.ptp(other) == 0:
        return float("nan")
    return float(stats.pearsonr(one, other).statistic)


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """NaN where one of them is constant."""
    if len(one) < 2:
        return float("nan")
    return pearson(stats.rankdata(one), stats.rankdata(other))


def _figure(value: float) -> float | None:
    return None if np.isnan(value) else value
