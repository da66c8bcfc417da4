"""Predictions do not depend on what else is in a batch, in any family."""

import numpy as np
import pytest

from hf_moe.evaluation import predict
from hf_moe.tasks import DataSettings, load_config, load_model, load_tokenizer, prepare_data
from tests.conftest import TEXT_FAMILIES, save_tokenizer, tiny_moe
from tests.evaluation.conftest import LABELS

# Task -> who has a head for it.
HEADS = {
    "text-classification": TEXT_FAMILIES,
    "token-classification": ["bert", "gpt2", "llama", "modernbert"],
    "question-answering": ["bert", "gpt2", "roberta"],
    "causal-lm": ["gpt2", "gemma2", "mistral", "opt"],
    "masked-lm": ["bert", "modernbert", "mpnet"],
    "sentence-embedding": ["bert", "llama"],
}
CASES = [(task, family) for task, families in HEADS.items() for family in families]


@pytest.mark.parametrize(("task", "family"), CASES)
def test_a_batch_predicts_as_one_row_alone(task, family, rows, tmp_path):
    tiny_moe(family).save_pretrained(tmp_path / "moe")
    save_tokenizer(family, tmp_path / "moe")
    settings = DataSettings(task=task, test_file=rows(task), doc_stride=8)
    tokenizer, config = load_tokenizer(tmp_path / "moe", task=task), load_config(tmp_path / "moe")
    prepared = prepare_data(settings, tokenizer, config, splits=("test",), labels=LABELS.get(task))
    model = load_model(task, tmp_path / "moe", labels=LABELS.get(task))
    alone, labels = predict(model, prepared, "test", batch_size=1)
    together, same = predict(model, prepared, "test", batch_size=5)
    for one, other in ((alone, together), (labels, same)):
        for part, twin in zip(as_tuple(one), as_tuple(other), strict=True):
            real = part != -100
            np.testing.assert_allclose(part[real], twin[: len(part), ...][real], atol=2e-4, rtol=1e-3)


def as_tuple(arrays):
    return arrays if isinstance(arrays, tuple) else (arrays,)
