"""Tagging: entities found whole (strict IOB2), beside the token accuracy that flatters."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_moe.tasks.conll import is_entity_scheme

from .calibration import expected_calibration_error, reliability
from .measured import IGNORED, Measured, first_of


def tag_choices(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """(B, T, 4) of each token: tag chosen, its probability, the true tag's loss in nats, the Brier score."""
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    logs = logits.float().log_softmax(-1)
    sure, chosen = logs.max(-1)
    true = logs.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    brier = logs.exp().square().sum(-1) - 2 * true.exp() + 1
    return torch.stack([chosen.to(logs.dtype), sure.exp(), -true, brier], dim=-1)


def entity_scores(truth: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Precision, recall and F1 of entities by seqeval, strict IOB2: an entity counts if its type and both ends are
    right, and one that does not begin with B is none. With token accuracy, and what tagging every token O would have.

    Returns:
        `precision`, `recall`, `f1`, `f1_macro` (over the types that occur), `token_accuracy`, `all_o_f1`,
        `all_o_token_accuracy`, and `classification_report` by type.
    """
    from seqeval.metrics import classification_report
    from seqeval.scheme import IOB2

    flat = [(t, p) for own, guess in zip(truth, predicted, strict=True) for t, p in zip(own, guess, strict=True)]
    report: dict[str, Any] = {}
    if any(tag != "O" for pair in flat for tag in pair):
        with warnings.catch_warnings():  # where none of the tags make an entity
            warnings.simplefilter("ignore")
            report = classification_report(
                list(map(list, truth)),
                list(map(list, predicted)),
                mode="strict",
                scheme=IOB2,
                output_dict=True,
                zero_division=0,
            )
    micro = report.get("micro avg", {"precision": 0.0, "recall": 0.0, "f1-score": 0.0})
    kinds = [entry["f1-score"] for name, entry in report.items() if not name.endswith(" avg") and entry["support"]]
    return {
        "precision": float(micro["precision"]),
        "recall": float(micro["recall"]),
        "f1": float(micro["f1-score"]),
        "f1_macro": float(np.mean(kinds)) if kinds else 0.0,
        "token_accuracy": sum(t == p for t, p in flat) / len(flat),
        "all_o_f1": 0.0,
        "all_o_token_accuracy": sum(t == "O" for t, _ in flat) / len(flat),
        "classification_report": _plain(report),
    }


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """seqeval's numbers are NumPy's."""
    return {
        name: {key: (int(value) if key == "support" else float(value)) for key, value in entry.items()}
        for name, entry in report.items()
    }


def _counts(truth: list[str], predicted: list[str]) -> tuple[int, int, int]:
    """Entities right, there, and predicted in one sentence."""
    from seqeval.scheme import IOB2, Tokens

    own = {(e.start, e.end, e.tag) for e in Tokens(truth, IOB2).entities}
    guess = {(e.start, e.end, e.tag) for e in Tokens(predicted, IOB2).entities}
    return len(own & guess), len(own), len(guess)


def measure_tagging(predictions: Any, labels: Any, prepared: Any, split: str) -> Measured:
    """From `tag_choices`; what is no first token of a word does not count."""
    from sklearn.metrics import confusion_matrix

    choices, labels, names = first_of(predictions), np.asarray(labels), prepared.labels
    asked = labels != IGNORED
    truth = [[names[label] for label in row[here]] for row, here in zip(labels, asked, strict=True)]
    predicted = [
        [names[int(choice)] for choice in row[here]] for row, here in zip(choices[..., 0], asked, strict=True)
    ]
    right = choices[..., 0][asked] == labels[asked]
    bins = reliability(choices[..., 1][asked].astype(np.float64), right)
    metrics: dict[str, Any] = {
        "nll": float(choices[..., 2][asked].mean()),
        "brier": float(choices[..., 3][asked].mean()),
        "ece": expected_calibration_error(bins),
    }
    numbers = list(range(len(names)))
    confusion = confusion_matrix(labels[asked], choices[..., 0][asked].astype(int), labels=numbers)
    tables: dict[str, Any] = {"confusion_matrix": confusion.tolist(), "reliability": bins}
    words = list(prepared.raw[split][prepared.report["columns"]["text"]])
    records = [
        {"row": row, "words": words[row] if len(words[row]) == len(own) else None, "labels": own, "predictions": guess}
        for row, own, guess in zip(prepared.details[split]["example"], truth, predicted, strict=True)
    ]
    lost = prepared.report["splits"].get(split, {}).get("words_lost", 0)
    notes = [f"{lost} words are not scored: they were cut off, or have no token."] if lost else []
    if is_entity_scheme(set(names)):
        scores = entity_scores(truth, predicted)
        tables["classification_report"] = scores.pop("classification_report")
        counts = np.array([_counts(own, guess) for own, guess in zip(truth, predicted, strict=True)])
        notes.append("Entities by seqeval, strict IOB2. Token accuracy counts O, which most tokens are.")

        def entity_f1(rows: np.ndarray) -> float:
            hit, there, said = counts[rows].sum(axis=0)
            return float(2 * hit / max(1, there + said))

        return Measured(
            metrics=scores | metrics, records=records, metric="f1", greater_is_better=True, statistic=entity_f1,
            examples=truth, tables=tables, notes=notes,
        )  # fmt: skip
    hits = np.array([[sum(t == p for t, p in zip(own, guess, strict=True)), len(own)] for own, guess in
                     zip(truth, predicted, strict=True)])  # fmt: skip

    def accuracy(rows: np.ndarray) -> float:
        hit, there = hits[rows].sum(axis=0)
        return float(hit / max(1, there))

    return Measured(
        metrics={"token_accuracy": accuracy(np.arange(len(hits)))} | metrics, records=records,
        metric="token_accuracy", greater_is_better=True, statistic=accuracy, examples=truth, tables=tables,
        notes=[*notes, "The tags mark no entities, so there is no entity-level F1."],
    )  # fmt: skip
