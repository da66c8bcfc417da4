"""Tiny models with heads, and rows for them, on disk."""

import json

import pytest
import torch

from hf_moe.tasks import load_model, load_tokenizer
from tests.tasks.conftest import TEXTS, files  # noqa: F401

CLASSES = ["b", "a", "b", "a", "c", "a"]
QUESTION = {
    "question": "what sat",
    "context": "the dog sat on a mat",
    "answers": {"text": ["dog"], "answer_start": [4]},
}

ROWS = {
    "masked-lm": [{"text": text} for text in TEXTS],
    "causal-lm": [{"text": text} for text in TEXTS],
    "text-classification": [{"text": text, "label": label} for text, label in zip(TEXTS, CLASSES, strict=True)],
    "token-classification": [
        {"tokens": text.split(), "tags": ["B-A" if word in ("dog", "cat", "law") else "O" for word in text.split()]}
        for text in TEXTS
    ],
    "question-answering": [QUESTION, QUESTION | {"answers": {"text": ["the dog", "dog"], "answer_start": [0, 4]}}],
    "sentence-embedding": [{"anchor": text, "positive": text[:9]} for text in TEXTS],
}
LABELS = {"text-classification": ["a", "b", "c"], "token-classification": ["B-A", "I-A", "O"]}
FAMILY = {"causal-lm": "gpt2"}


@pytest.fixture
def rows(files):  # noqa: F811
    """(task) -> the name of a file of its rows, in the current folder."""

    def write(task):
        folder = files()
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[task]))
        return "rows.jsonl"

    return write


@pytest.fixture
def model(dense_folder, tmp_path):
    """(task, name, seed) -> a folder with a model that has the task's head, drawn by the seed."""

    def save(task, name, seed=0, **options):
        folder = dense_folder(FAMILY.get(task, "bert"))
        torch.manual_seed(seed)
        made = load_model(task, folder, labels=LABELS.get(task), **options)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter += 0.1 * seed * torch.randn(parameter.shape)
        made.save_pretrained(tmp_path / name)
        load_tokenizer(folder).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save
