"""From rows to a trained mixture to its figures, where a text has several labels, or a number."""

import json

import pytest

from hf_moe.evaluation import evaluate
from hf_moe.tasks import DataSettings, load_config
from hf_moe.training import TrainRecipe, train
from tests.training.runs import NOUNS, keys_for

# What a text's label is, by the nouns in it -> (problem type, what a new head has outputs for, figures).
KINDS = {
    "several": (
        lambda nouns: nouns,
        ("multi_label_classification", len(NOUNS)),
        {"accuracy", "f1_macro", "f1_micro", "nll", "brier", "ece"},
    ),
    "a number": (
        lambda nouns: len(nouns) + 0.5,
        ("regression", 1),
        {"pearson", "spearman", "mse", "mae", "mean_mse"},
    ),
}


def relabelled(file, label):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    found = [row | {"label": label([noun for noun in NOUNS if noun in row["text"]])} for row in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_trained_and_measured(kind, dense_folder, tmp_path):
    label, head, figures = KINDS[kind]
    keys = keys_for("text-classification", dense_folder("bert"), tmp_path, max_steps=40, learning_rate=1e-2)
    keys |= {"upcycle": {"num_experts": 4, "drop_ratio": 0.5}, "eval_strategy": "steps", "eval_steps": 20}
    for name in ("train_file", "validation_file"):
        relabelled(tmp_path / keys[name].rpartition("/")[2], label)
    made = train(TrainRecipe.from_dict(keys), quiet=True)
    config = load_config(made.path)
    assert (config.problem_type, config.num_labels) == head
    losses = [row["eval_loss"] for row in made.report["history"] if "eval_loss" in row]
    assert losses[-1] < losses[0]

    settings = DataSettings(task="text-classification", test_file=keys["validation_file"])
    [found] = evaluate([made.path], settings).report["models"]
    assert set(found["metrics"]) == figures
    for name, value in found["metrics"].items():
        assert made.metrics[f"eval_{name}"] == pytest.approx(value, rel=1e-4), name
    if kind == "several":
        rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
        for name, ((neither, guessed), (missed, hit)) in found["confusion_by_label"].items():
            assert neither + guessed + missed + hit == len(rows)
            assert missed + hit == sum(name in row["label"] for row in rows)
