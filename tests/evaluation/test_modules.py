"""Metrics of our own for `evaluate`: opened from the package, in a process that has no network."""

import subprocess
import sys

import pytest

from hf_moe.errors import UsageError
from hf_moe.evaluation.modules import module_path

SCRIPT = """
import math
import socket

def refuse(*arguments, **options):
    raise AssertionError("a metric asked for the network")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse

import evaluate
from hf_moe.evaluation.modules import module_path

calibration = evaluate.load(module_path("calibration"))
found = calibration.compute(predictions=[[0.8, 0.2], [0.4, 0.6]], references=[0, 1])
assert abs(found["ece"] - 0.3) < 1e-9, found
entities = evaluate.load(module_path("entities"))
found = entities.compute(predictions=[["B-A", "O"]], references=[["B-A", "I-A"]])
assert (found["f1"], found["token_accuracy"]) == (0.0, 0.5), found
perplexity = evaluate.load(module_path("perplexity"))
found = perplexity.compute(predictions=[2.0], references=["a b"], tokens=[2])
assert abs(found["word_perplexity"] - math.e) < 1e-9, found
print("done")
"""


def test_they_load_and_compute_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout == "done\n", done.stderr


def test_another_name_is_refused():
    with pytest.raises(UsageError, match="metric 'bleu' is not known; choose from calibration, entities, perplexity"):
        module_path("bleu")
