"""`hf-moe evaluate` as a user types it."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe.cli.show import OUT
from hf_moe.evaluation import metrics_for, preprocess_logits_for
from hf_moe.tasks import TASKS, DataSettings, load_config, load_model, load_tokenizer, prepare_data
from tests.evaluation.conftest import LABELS, ROWS
from tests.tasks.conftest import TEXTS

FIGURES = {
    "masked-lm": {"nll", "masked_perplexity", "accuracy", "predicted_tokens"},
    "causal-lm": {"nll", "perplexity", "word_perplexity", "bits_per_byte", "accuracy", "predicted_tokens"},
    "text-classification": {
        "accuracy", "f1_macro", "f1_micro", "matthews", "nll", "brier", "ece", "majority_accuracy",
    },
    "token-classification": {
        "precision", "recall", "f1", "f1_macro", "token_accuracy", "all_o_f1", "all_o_token_accuracy", "nll", "brier",
        "ece",
    },
    "question-answering": {"exact_match", "f1"},
    "sentence-embedding": {"mrr", "accuracy_at_1", "mean_cosine"},
}  # fmt: skip
OPTIONS = {"question-answering": ["--doc-stride", "8"]}


@pytest.fixture
def run(hf_moe_command):
    return partial(hf_moe_command, "evaluate")


@pytest.mark.parametrize("task", TASKS)
def test_two_models_at_every_task(task, run, model, rows):
    first, other = model(task, "dense"), model(task, "tuned", seed=1)
    code, out, err = run(
        first, other, "--task", task, "--data", rows(task), "--output", "out", "--json", *OPTIONS.get(task, [])
    )
    assert code == 0, err
    report = json.loads(out)
    written = json.loads((first.parent / "out" / "metrics.json").read_text())
    assert written | {"output": "out"} == report
    assert [entry["name"] for entry in report["models"]] == ["dense", "tuned"]
    for entry in report["models"]:
        assert set(entry["metrics"]) == FIGURES[task]
        assert all(value is not None and math.isfinite(value) for value in entry["metrics"].values())
    [compared] = report["comparisons"]
    values = [entry["metrics"][report["metric"]] for entry in report["models"]]
    assert compared["difference"] == pytest.approx(values[1] - values[0])
    assert compared["interval"][0] <= compared["difference"] <= compared["interval"][1]
    lines = [json.loads(line) for line in (first.parent / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [line["model"] for line in lines] == ["dense"] * len(ROWS[task]) + ["tuned"] * len(ROWS[task])
    pictures = {file.name for file in (first.parent / "out").glob("*.png")}
    assert pictures == set(written["pictures"])
    assert ("confusion-1.png" in pictures) == task.endswith("classification")


@pytest.mark.parametrize(
    "task", ["masked-lm", "causal-lm", "text-classification", "token-classification", "question-answering"]
)
def test_trainer_gets_the_same_figures(task, run, model, rows, tmp_path):
    folder, file = model(task, "dense", seed=1), rows(task)
    code, out, err = run(folder, "--task", task, "--data", file, "--json", "--batch-size", "4", *OPTIONS.get(task, []))
    assert code == 0, err
    settings = DataSettings(task=task, validation_file=file, doc_stride=8)
    prepared = prepare_data(
        settings, load_tokenizer(folder, task=task), load_config(folder), splits=("validation",),
        labels=LABELS.get(task),
    )  # fmt: skip
    trainer = Trainer(
        model=load_model(task, folder),
        args=TrainingArguments(output_dir=str(tmp_path / "run"), use_cpu=True, report_to=[], disable_tqdm=True),
        data_collator=prepared.collator,
        eval_dataset=prepared.validation,
        compute_metrics=metrics_for(task, prepared),
        preprocess_logits_for_metrics=preprocess_logits_for(task),
    )
    found = trainer.evaluate()
    for name, value in json.loads(out)["models"][0]["metrics"].items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name


def test_perplexity_is_that_of_the_model_alone(run, model, rows):
    """Every token but the first of each text, one text at a time."""
    folder = model("causal-lm", "dense", seed=1)
    for options in ([], ["--packing", "--max-length", "64"]):
        code, out, err = run(folder, "--task", "causal-lm", "--data", rows("causal-lm"), "--json", *options)
        assert code == 0, err
        found = json.loads(out)["models"][0]["metrics"]
        tokenizer, loaded = load_tokenizer(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
        end = [] if not options else [tokenizer.eos_token_id]
        total = count = 0.0
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"] + end])
            with torch.no_grad():
                total += loaded(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
        if not options:
            assert found["predicted_tokens"] == count
            assert found["nll"] == pytest.approx(total / count, rel=1e-5)


def test_a_table_for_people(run, model, rows, monkeypatch):
    monkeypatch.setattr(OUT, "_width", 160)
    folder = model("token-classification", "dense")
    other = model("token-classification", "other", seed=1)
    code, out, err = run(folder, other, "--task", "token-classification", "--data", rows("token-classification"))
    assert code == 0, err
    assert "all o token accuracy" in out
    assert "other against dense, f1: " in out
    assert "strict IOB2" in out
    code, out, _ = run(folder, "--task", "token-classification", "--data", "rows.jsonl", "-q")
    assert (code, out) == (0, "")


def test_what_is_taken_for_what_tag_by_tag(run, model, rows):
    folder = model("token-classification", "dense", seed=1)
    code, out, err = run(folder, "--task", "token-classification", "--data", rows("token-classification"), "--json")
    assert code == 0, err
    told, names = json.loads(out), LABELS["token-classification"]
    tags = [tag for row in ROWS["token-classification"] for tag in row["tags"]]
    confusion = told["models"][0]["confusion_matrix"]
    assert [sum(row) for row in confusion] == [tags.count(name) for name in names]
    right = sum(confusion[place][place] for place in range(len(names)))
    assert told["models"][0]["metrics"]["token_accuracy"] == pytest.approx(right / len(tags))


def test_rows_that_ask_nothing_keep_the_others_numbers(run, model, files):
    """What is left out is no example, and the lines of the others say which row they are of."""
    held = ROWS["token-classification"][:2]
    files(rows_jsonl=[{"tokens": [], "tags": []}, held[0], {"tokens": [], "tags": []}, held[1]])
    folder = model("token-classification", "dense", seed=1)
    code, _, err = run(folder, "--task", "token-classification", "--data", "rows.jsonl", "--output", "out")
    assert code == 0, err
    lines = [json.loads(line) for line in (folder.parent / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [(line["row"], line["words"]) for line in lines] == [(1, held[0]["tokens"]), (3, held[1]["tokens"])]


def refused(run, *arguments):
    code, out, err = run(*arguments)
    assert out == ""
    assert err.startswith("Error: ")
    assert err.count("\n") == 1, err
    return code, err


def test_what_is_wrong_is_said_in_one_line(run, model, rows, dense_folder, tmp_path):
    folder, file = model("text-classification", "dense"), rows("text-classification")
    task = ["--task", "text-classification", "--data", file]
    (tmp_path / "there").mkdir()
    cases = {
        "has no trained head for text-classification (bert.pooler": [dense_folder("bert"), *task],
        "--output is for what is measured on --data": [folder, "--lm-eval", "pets", "--output", "out"],
        "There is nothing to measure on": [folder, "--task", "text-classification"],
        "Name what is measured by --task": [folder, "--data", file],
        "task 'classification' is not known": [folder, "--task", "classification", "--data", file],
        "is named twice": [folder, folder, *task],
        "dtype 'half-ish' is none of torch's": [folder, *task, "--dtype", "half-ish"],
        "batch_size must be at least 1": [folder, *task, "--batch-size", "0"],
        "no such file": [folder, "--task", "text-classification", "--data", "gone.jsonl"],
        "exists already; --overwrite replaces it": [folder, *task, "--output", "there"],
        "overlaps the source": [folder, *task, "--output", str(folder / "inside")],
        "has no head for causal-lm": [dense_folder("distilbert"), "--task", "causal-lm", "--data", file],
    }
    for words, arguments in cases.items():
        code, err = refused(run, *arguments)
        assert words in err
        assert code in (1, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "rows.jsonl", "there"}


def test_two_processes_measure_what_one_does(model, rows, run):
    folder, file = model("token-classification", "dense", seed=1), rows("token-classification")
    arguments = ["evaluate", str(folder), "--task", "token-classification", "--data", file, "--json"]
    code, out, err = run(*arguments[1:])
    assert code == 0, err
    launched = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "hf_moe", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert launched.returncode == 0, launched.stderr
    one, two = json.loads(out), json.loads(launched.stdout)
    for name, value in one["models"][0]["metrics"].items():
        assert two["models"][0]["metrics"][name] == pytest.approx(value, rel=1e-5)
