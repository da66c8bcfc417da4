"""How good a model is at its task, and whether it is better than another."""

from .bootstrap import paired_bootstrap
from .measured import Measured
from .metrics import metrics_for, preprocess_logits_for
from .predict import predict
from .run import Evaluated, evaluate

__all__ = [
    "Evaluated",
    "Measured",
    "evaluate",
    "metrics_for",
    "paired_bootstrap",
    "predict",
    "preprocess_logits_for",
]
