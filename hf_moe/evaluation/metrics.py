"""A task's figures, for Trainer while it trains and for `evaluate` alike."""

from collections.abc import Callable
from functools import partial
from typing import Any

from transformers import EvalPrediction

from hf_moe.tasks import PreparedData

from .answers import measure_answers
from .classification import measure_classification
from .entities import measure_tagging, tag_choices
from .language import measure_language, token_losses
from .measured import Measured
from .sentences import measure_sentences

# Task -> (predictions, labels, prepared data, split) -> what is measured.
MEASURES: dict[str, Callable[[Any, Any, PreparedData, str], Measured]] = {
    "masked-lm": measure_language,
    "causal-lm": measure_language,
    "text-classification": measure_classification,
    "token-classification": measure_tagging,
    "question-answering": measure_answers,
    "sentence-embedding": measure_sentences,
}

# Task -> what is kept of a batch's logits; all of them, where it is not here.
KEPT: dict[str, Callable[[Any, Any], Any]] = {
    "masked-lm": partial(token_losses, shifted=False),
    "causal-lm": partial(token_losses, shifted=True),
    "token-classification": tag_choices,
}


def metrics_for(
    task: str, prepared: PreparedData, *, split: str = "validation"
) -> Callable[[EvalPrediction], dict[str, float]]:
    """Trainer's `compute_metrics`. Figures that there are none of (a correlation with a constant) are NaN.

    Args:
        split: the one that is evaluated on; question answering and perplexity by word read it.
    """

    def compute_metrics(predicted: EvalPrediction) -> dict[str, float]:
        measured = MEASURES[task](predicted.predictions, predicted.label_ids, prepared, split)
        return {name: float("nan") if value is None else value for name, value in measured.metrics.items()}

    return compute_metrics


def preprocess_logits_for(task: str) -> Callable[[Any, Any], Any] | None:
    """Trainer's `preprocess_logits_for_metrics`; None where all logits are kept."""
    return KEPT.get(task)
