"""A metric for the `evaluate` library, opened from this file: perplexity by token and by word, and bits per byte."""

import datasets
import evaluate
import numpy as np

from hf_moe.evaluation.language import perplexity

DESCRIPTION = "Perplexity of texts from their losses: by token, by word (what stands between blanks), bits per byte."


class Perplexity(evaluate.Metric):
    """`predictions`: the loss of each text, a sum in nats; `references`: its text, all of which was predicted."""

    def _info(self):
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description="predictions: summed loss of each text in nats; references: the texts; tokens: counts.",
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, tokens):
        words = sum(len(text.split()) for text in references)
        size = sum(len(text.encode()) for text in references)
        return perplexity(np.asarray(predictions), np.asarray(tokens), words=words, num_bytes=size)
