"""The lm-eval harness on a task of one's own, and without it."""

import json
from functools import partial
from importlib import util

import pytest
import torch

from hf_moe.tasks import load_tokenizer
from tests.conftest import save_tokenizer, tiny_moe

TASK = """
task: pets
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/pets.jsonl
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
QUESTIONS = [
    {"question": "the cat sat on the", "choices": ["mat", "law", "war"], "answer": 0},
    {"question": "a free", "choices": ["people", "dog"], "answer": 0},
    {"question": "war and", "choices": ["cat", "peace"], "answer": 1},
    {"question": "the law of the", "choices": ["dog", "nation"], "answer": 1},
]


@pytest.fixture
def run(hf_moe_command):
    return partial(hf_moe_command, "evaluate")


@pytest.fixture
def moe(tmp_path):
    tiny_moe("gpt2").save_pretrained(tmp_path / "moe")
    save_tokenizer("gpt2", tmp_path / "moe")
    return tmp_path / "moe"


def chosen(folder, question):
    """By the likelihood of each choice after a blank, as the harness puts it."""
    tokenizer, model = load_tokenizer(folder), tiny_moe("gpt2")
    scores = []
    for choice in question["choices"]:
        start = len(tokenizer(question["question"])["input_ids"])
        ids = torch.tensor([tokenizer(f"{question['question']} {choice}")["input_ids"]])
        with torch.no_grad():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        scores.append(logs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item())
    return scores.index(max(scores))


def test_a_task_of_one_s_own(run, moe, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pets.yaml").write_text(TASK.format(folder=tmp_path))
    (tmp_path / "pets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    code, out, err = run(moe, "--lm-eval", "pets", "--lm-eval-include-path", tmp_path / "tasks", "--json")
    assert code == 0, err
    [figures] = json.loads(out)["lm_eval"].values()
    right = [chosen(moe, question) == question["answer"] for question in QUESTIONS]
    assert figures["pets"]["acc,none"] == pytest.approx(sum(right) / len(right))
    code, out, err = run(moe, "--lm-eval", "cats", "--lm-eval-include-path", tmp_path / "tasks")
    assert (code, out) == (2, "")
    assert err == "Error: lm-eval knows no task 'cats'; `lm-eval ls tasks` lists them.\n"


def test_without_it_the_extra_is_named(run, moe, monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *more: None if name == "lm_eval" else found(name, *more))
    code, out, err = run(moe, "--lm-eval", "pets")
    assert (code, out) == (2, "")
    assert err == "Error: This needs lm_eval; pip install 'hf_moe[lm-eval]'.\n"


def test_it_is_for_causal_models(run, dense_folder, tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pets.yaml").write_text(TASK.format(folder=tmp_path))
    code, out, err = run(dense_folder("distilbert"), "--lm-eval", "pets", "--lm-eval-include-path", tmp_path / "tasks")
    assert (code, out) == (2, "")
    assert "has no head for causal-lm" in err
