"""Rows on disk, and what prepares them."""

import json

import datasets
import pytest

from hf_moe.tasks import DataSettings, load_config, load_tokenizer, prepare_data

datasets.disable_progress_bars()

TEXTS = ["the dog sat on a mat", "a cat sat", "war and peace", "the law of the people", "god light earth", "free cat"]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """(name=text or rows, …) -> files in a folder of their own, which is the current one."""
    monkeypatch.chdir(tmp_path)

    def write(**contents):
        for name, content in contents.items():
            stem, _, ending = name.rpartition("_")
            file = tmp_path / f"{stem}.{ending}"
            if isinstance(content, bytes):
                file.write_bytes(content)
            elif ending == "jsonl" and not isinstance(content, str):
                file.write_text("".join(json.dumps(row) + "\n" for row in content))
            elif ending == "json" and not isinstance(content, str):
                file.write_text(json.dumps(content))
            else:
                file.write_text(content)
        return tmp_path

    return write


@pytest.fixture
def prepare(dense_folder):
    """(task, family=…, labels=…, splits=…, **settings) -> what `prepare_data` makes, and the tokenizer."""

    def run(task, *, family="bert", labels=None, splits=("train", "validation", "test"), **settings):
        folder = dense_folder(family)
        tokenizer = load_tokenizer(folder, task=task)
        made = prepare_data(
            DataSettings(task=task, **settings), tokenizer, load_config(folder), splits=splits, labels=labels
        )
        return made, tokenizer

    return run
