"""Perplexity, by token and by word, and bits per byte."""

import math
from typing import Any

import numpy as np
import torch

from .measured import IGNORED, Measured, first_of


def token_losses(logits: Any, labels: torch.Tensor, *, shifted: bool) -> torch.Tensor:
    """(B, 3) of each row: sum of the losses in nats, tokens predicted, how many of them right. The logits, (B, T, V),
    are far too large to be kept.

    Args:
        shifted: whether the logits at t are for the label at t + 1.
    """
    logits = logits[0] if isinstance(logits, tuple | list) else logits
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    made = []
    for row_TV, label_T in zip(logits, labels, strict=True):  # one row at a time: float32 copies are large
        asked = label_T != IGNORED
        row_TV, label_T = row_TV[asked].float(), label_T[asked]
        losses = torch.nn.functional.cross_entropy(row_TV, label_T, reduction="sum")
        right = (row_TV.argmax(-1) == label_T).sum()
        made.append(torch.stack([losses, asked.sum().to(losses), right.to(losses)]))
    return torch.stack(made)


def perplexity(
    losses: np.ndarray, tokens: np.ndarray, *, words: int | None = None, num_bytes: int | None = None
) -> dict[str, float | None]:
    """Figures of a text.

    Args:
        losses: (N,), nats of each row.
        tokens: (N,), tokens predicted.
        words, num_bytes: of the text that those tokens end; None where it is not known.
    """
    total = float(np.sum(losses, dtype=np.float64))
    made: dict[str, float | None] = {"nll": total / float(np.sum(tokens))}
    made["perplexity"] = _exp(made["nll"])
    if words:
        made["word_perplexity"] = _exp(total / words)
    if num_bytes:
        made["bits_per_byte"] = total / num_bytes / math.log(2)
    return made


def _exp(value: float | None) -> float:
    return math.exp(value) if value is not None and value < 700 else math.inf


def measure_language(predictions: Any, labels: Any, prepared: Any, split: str) -> Measured:
    """From `token_losses` of each row."""
    predictions = first_of(predictions).astype(np.float64)
    losses, tokens, right = predictions[:, 0], predictions[:, 1], predictions[:, 2]
    counted = prepared.report["splits"].get(split, {})
    masked = prepared.task == "masked-lm"
    metrics = perplexity(losses, tokens, words=counted.get("words"), num_bytes=counted.get("bytes"))
    metrics["accuracy"] = float(right.sum() / tokens.sum())
    metrics["predicted_tokens"] = float(tokens.sum())
    if masked:
        metrics["masked_perplexity"] = metrics.pop("perplexity")
        notes = [
            "The loss is that of masked tokens, the same ones each time (by the seed); it is no perplexity of text."
        ]
    else:
        notes = [
            "perplexity is by token of the model's own tokenizer, word_perplexity by what stands between blanks; "
            "only the latter and bits_per_byte compare models of different tokenizers. A row's first token is not "
            "predicted."
        ]

    numbers = prepared.details[split]["example"] if split in prepared.details else range(len(losses))

    def statistic(rows: np.ndarray) -> float:
        return float(losses[rows].sum() / tokens[rows].sum())

    return Measured(
        metrics=metrics,
        records=[
            {"row": row, "nll": loss, "tokens": int(count)}
            for row, loss, count in zip(numbers, losses.tolist(), tokens.tolist(), strict=True)
        ],
        metric="nll",
        greater_is_better=False,
        statistic=statistic,
        examples=tokens.tolist(),
        notes=notes,
    )
