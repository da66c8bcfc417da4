"""A metric for the `evaluate` library, opened from this file: entities by strict IOB2, beside token accuracy."""

import datasets
import evaluate

from hf_moe.evaluation.entities import entity_scores

DESCRIPTION = (
    "Entity-level precision, recall and F1 (seqeval, strict IOB2), token accuracy, and what all O would have."
)


class Entities(evaluate.Metric):
    """`predictions`, `references`: a list of IOB2 tags a sentence."""

    def _info(self):
        tags = datasets.Sequence(datasets.Value("string"))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions, references: lists of IOB2 tags.",
            features=datasets.Features({"predictions": tags, "references": tags}),
        )

    def _compute(self, predictions, references):
        return entity_scores(references, predictions)
