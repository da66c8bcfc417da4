"""A metric for the `evaluate` library, opened from this file: NLL, Brier score and ECE of a classifier."""

import datasets
import evaluate
import numpy as np

from hf_moe.evaluation.calibration import calibration

DESCRIPTION = "How far a classifier's probabilities can be believed: NLL in nats, Brier score, ECE in 15 equal bins."


class Calibration(evaluate.Metric):
    """`predictions`: rows of probabilities; `references`: the true classes."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: probabilities of each class; references: the true classes.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return calibration(np.asarray(predictions, dtype=np.float64), np.asarray(references))
