"""`hf-moe train` as a user types it."""

import json
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import hf_moe
from hf_moe.recipes import files as packaged
from hf_moe.training import TrainRecipe, train
from tests.training.runs import keys_for, recipe_for, write_recipe, write_rows

TASKS = {
    "masked-lm": "bert",
    "causal-lm": "gpt2",
    "text-classification": "bert",
    "token-classification": "bert",
    "question-answering": "bert",
    "sentence-embedding": "bert",
}


@pytest.mark.parametrize(("task", "family"), TASKS.items())
def test_every_task_trains(task, family, mixture, hf_moe_command, tmp_path):
    keys = keys_for(task, mixture(family), tmp_path, eval_strategy="steps", eval_steps=1)
    keys["test_file"] = write_rows(tmp_path / "test.jsonl", task, 5, seed=2)
    code, out, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    assert "step 2/2: loss" in err
    assert "parameters (100.0%)" in out
    assert not re.search(r"^new *$", out, re.MULTILINE)
    made = tmp_path / "out"
    assert not (tmp_path / "out.partial").exists()
    assert {"model.safetensors", "config.json", "recipe.yaml", "training.json", "moe_layers.py"} <= {
        file.name for file in made.iterdir()
    }
    assert not (made / "training_args.bin").exists()
    assert not (made / "certificate.json").exists()
    report = json.loads((made / "training.json").read_text())
    assert report["steps"] == 2
    assert report["metrics"]["eval_loss"] > 0
    assert report["metrics"]["test_loss"] > 0
    assert report["data"]["files"]["train.jsonl"]["sha256"]
    assert report["versions"]["transformers"]
    assert report["seeds"]["seed"] == 0
    assert report["trains"]["share"] == 1
    assert report["tokens"] > 0
    assert str(tmp_path) not in (made / "training.json").read_text()
    assert str(tmp_path) not in (made / "recipe.yaml").read_text()
    logged = [row for row in report["history"] if "loss" in row]
    assert all({"aux_loss", "task_loss", "routing/entropy", "tokens_per_second"} <= set(row) for row in logged)


def test_a_trained_classifier_loads_elsewhere_and_trains_on(mixture, hf_moe_command, tmp_path):
    keys = keys_for("text-classification", mixture("bert"), tmp_path, max_steps=60, learning_rate=1e-2)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys), "-q")
    assert (code, err) == (0, "")
    script = (
        "import sys; from transformers import pipeline\n"
        "classify = pipeline('text-classification', sys.argv[1], trust_remote_code=True)\n"
        "assert 'hf_moe' not in sys.modules\n"
        "print(classify('the law of the law')[0]['label'], classify('a dog sat')[0]['label'])"
    )
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True)
    assert ran.stdout.split() == ["law", "other"], ran.stderr
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert isinstance(model, hf_moe.BertMoeForSequenceClassification)
    assert model.config.id2label == {0: "law", 1: "other"}
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the law")["input_ids"]
    on = ["--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "on", "--max_steps", 1]
    code, _, err = hf_moe_command("train", tmp_path / "recipe.yaml", "-q", *on)
    assert code == 0, err
    report = json.loads((tmp_path / "on" / "training.json").read_text())
    assert report["history"][0]["task_loss"] < 0.3  # it goes on from where it was


def test_from_dense_to_trained_in_one_command(dense_folder, hf_moe_command, tmp_path):
    dense = dense_folder("gpt2")
    keys = keys_for("causal-lm", dense, tmp_path, upcycle={"num_experts": 4}, freeze="experts_only")
    recipe = write_recipe(tmp_path / "recipe.yaml", keys)
    code, out, err = hf_moe_command("train", recipe, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["upcycle"]["exactness"] == "exact"
    assert json.loads(out)["recipe"]["upcycle"] == {"num_experts": 4}
    code, out, err = hf_moe_command("train", recipe, "--upcycle.num_experts_per_tok", 1, "--json")
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == 4
    assert config["num_experts_per_tok"] == 1
    assert config["upcycled_from"]["source"] == dense.name
    assert config.get("use_cache", True)
    assert not (tmp_path / "out" / "start").exists()
    assert json.loads(out)["start"]["passed"]
    assert json.loads(out)["trains"]["by_kind"]["other"]["parameters"] == 0


def test_dry_run_tells_and_writes_nothing(mixture, hf_moe_command, tmp_path):
    keys = keys_for("text-classification", mixture("bert"), tmp_path, freeze="experts_only")
    recipe = write_recipe(tmp_path / "recipe.yaml", keys)
    before = sorted(tmp_path.iterdir())
    code, out, err = hf_moe_command("train", recipe, "--dry-run", "--learning_rate", "2e-4")
    assert code == 0, err
    assert "learning_rate: 0.0002" in out
    assert "experts" in out
    assert "sha256" in out
    assert re.search(r"new +bert\.pooler\.dense\.bias, ", out)
    code, out, _ = hf_moe_command("train", recipe, "--dry-run", "--json")
    told = json.loads(out)
    assert TrainRecipe.from_dict(told["recipe"]).method.freeze == "experts_only"
    assert 0 < told["trains"]["share"] < 1
    assert told["trains"]["by_kind"]["other"]["parameters"] == 1122  # a new head, with its pooler
    assert told["data"]["labels"] == ["law", "other"]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("task", "family", "changed", "words"),
    [
        ("masked-lm", "gpt2", {}, "masked-lm"),
        ("token-classification", "bert", {"task": "causal-lm"}, "has no text column"),
        ("causal-lm", "gpt2", {"eval_strategy": "no", "early_stopping_patience": 2}, "set eval_strategy to epoch or"),
        (
            "causal-lm",
            "gpt2",
            {"eval_strategy": "epoch", "early_stopping_patience": 2},
            "set load_best_model_at_end to true",
        ),
        (
            "text-classification",
            "bert",
            {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "f2"},
            "metric_for_best_model is 'f2', but evaluation gives accuracy",
        ),
        (
            "question-answering",
            "bert",
            {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "f2"},
            "but evaluation gives exact_match",
        ),
        ("causal-lm", "gpt2", {"metric_for_best_model": "nll"}, "needs evaluations"),
        ("causal-lm", "gpt2", {"validation_file": None, "eval_strategy": "epoch"}, "there are no validation rows"),
        ("causal-lm", "gpt2", {"freeze": ["xyz"]}, "'xyz' matches no parameter"),
        ("causal-lm", "gpt2", {"freeze": [".*"]}, "leaves nothing of GPT2MoeLMHeadModel to train"),
        ("causal-lm", "gpt2", {"freeze": "router_only", "peft": "attention"}, "both given"),
        (
            "causal-lm",
            "gpt2",
            {"upcycle": {"num_experts": 4}, "peft": "attention"},
            "adapters need a mixture that stays",
        ),
        ("question-answering", "bert", {"label_smoothing_factor": 0.1}, "has no labels to smooth"),
        ("causal-lm", "gpt2", {"config_overrides": {"colour": 1}}, "colour: the model's configuration has no such"),
        ("causal-lm", "gpt2", {"dropout": 2}, "dropout is 2"),
        ("causal-lm", "gpt2", {"router_jitter_noise": -1}, "router_jitter_noise is -1"),
        ("causal-lm", "gpt2", {"config_overrides": {"num_experts_per_tok": 9}}, "num_experts_per_tok is 9"),
        ("causal-lm", "gpt2", {"config_overrides": {"n_head": "four"}}, "expected int, got str"),
        (
            "causal-lm",
            "gpt2",
            {"per_device_train_batch_size": 0},
            "per_device_train_batch_size is 0; it must be at least 1",
        ),
        ("causal-lm", "gpt2", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0"),
        ("causal-lm", "gpt2", {"learning_rate": -1.0}, "learning_rate is -1.0; it must be at least 0"),
        ("causal-lm", "gpt2", {"label_smoothing_factor": 2.0}, "it must be between 0 and 1"),
        (
            "text-classification",
            "bert",
            {"label_smoothing_factor": 0.1, "problem_type": "multi_label_classification"},
            "a multi_label_classification has no labels to smooth",
        ),
        (
            "sentence-embedding",
            "bert",
            {"train_file": "scored.jsonl", "validation_file": None},
            "training takes each pair for one that belongs",
        ),
        ("sentence-embedding", "bert", {"train_sampling_strategy": "group_by_length"}, "has no one length"),
        ("causal-lm", "gpt2", {"peft": {"rank": 4}}, "did you mean 'r'?"),
        ("causal-lm", "gpt2", {"report_to": "wand"}, "recipe: "),
        ("causal-lm", "gpt2", {"upcycle": {"num_expert": 2}}, "did you mean 'num_experts'?"),
        ("causal-lm", "gpt2", {"train_file": None, "validation_file": None}, "There is no data"),
        ("causal-lm", "gpt2", {"model_name_or_path": "./nowhere"}, "./nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    task, family, changed, words, mixture, hf_moe_command, tmp_path, monkeypatch
):
    keys = keys_for(task, mixture(family), tmp_path) | changed
    recipe = write_recipe(tmp_path / "recipe.yaml", {name: value for name, value in keys.items() if value is not None})
    monkeypatch.chdir(tmp_path)
    row = {"sentence1": "the dog", "sentence2": "a law", "score": 0.1}
    (tmp_path / "scored.jsonl").write_text(json.dumps(row) + "\n")
    before = sorted(tmp_path.iterdir())
    code, out, err = hf_moe_command("train", recipe)
    assert code in (1, 2)
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1, err
    assert words in told[0]
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before


def test_a_dense_model_has_no_router(dense_folder, hf_moe_command, tmp_path):
    keys = keys_for("causal-lm", dense_folder("gpt2"), tmp_path, router_aux_loss_coef=0.1)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 2
    assert "no such field; it is dense" in err


def test_the_dense_control_trains_by_the_same_recipe(dense_folder, hf_moe_command, tmp_path):
    keys = keys_for("masked-lm", dense_folder("bert"), tmp_path)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["class"] == "BertForMaskedLM"
    assert not any("aux_loss" in row for row in report["history"])


def test_an_output_that_exists_stays(mixture, hf_moe_command, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", keys_for("causal-lm", mixture("gpt2"), tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    code, _, err = hf_moe_command("train", recipe)
    assert code == 2
    assert "exists already; --overwrite replaces it" in err
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
    assert hf_moe_command("train", recipe, "--overwrite", "-q")[0] == 0
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out.partial").exists()


def test_an_unknown_option_gets_a_suggestion(mixture, hf_moe_command, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", keys_for("causal-lm", mixture("gpt2"), tmp_path))
    code, _, err = hf_moe_command("train", recipe, "--lerning_rate", "0.1")
    assert code == 2
    assert "unknown key 'lerning_rate'; did you mean 'learning_rate'?" in err


def test_early_stopping_stops_and_keeps_the_best(mixture, hf_moe_command, tmp_path):
    stopping = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    stopping |= {"load_best_model_at_end": True, "early_stopping_patience": 2, "metric_for_best_model": "nll"}
    stopping |= {"max_steps": 20, "learning_rate": 3.0, "optim": "sgd"}
    keys = keys_for("causal-lm", mixture("gpt2"), tmp_path, max_grad_norm=0.0, **stopping)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    values = [row["eval_nll"] for row in report["history"] if "eval_nll" in row]
    assert report["steps"] < 20
    assert report["best"]["value"] == min(values)
    assert report["metrics"]["eval_nll"] == pytest.approx(min(values), rel=1e-5)


def test_loss_that_is_no_number_leaves_the_checkpoints(mixture, hf_moe_command, tmp_path, monkeypatch):
    from hf_moe.training import run
    from tests.training.test_trainer import Poison

    monkeypatch.setattr(run, "freeze", lambda *a, **k: [Poison("transformer.h.1.attn.c_proj.weight", 2)])
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    recipe = write_recipe(tmp_path / "recipe.yaml", keys_for("causal-lm", mixture("gpt2"), tmp_path, **saving))
    code, out, err = hf_moe_command("train", recipe)
    assert code == 1
    assert out == ""
    told = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(told) == 1
    assert "step 3: " in told[0]
    assert "transformer.h.1.attn.c_proj (layer 1)" in told[0]
    assert str(tmp_path / "out.partial" / "files" / "checkpoint-2") in told[0]
    assert (tmp_path / "out.partial" / "files" / "checkpoint-2" / "model.safetensors").exists()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    code, _, err = hf_moe_command("train", recipe, "--resume_from_checkpoint", "true", "-q")
    assert code == 0, err


def test_tensorboard_has_the_figures_of_the_mixture(mixture, hf_moe_command, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    keys = keys_for("causal-lm", mixture("gpt2"), tmp_path, report_to="tensorboard")
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    [run] = (tmp_path / "out" / "runs").iterdir()
    held = EventAccumulator(str(run)).Reload()
    tags = set(held.Tags()["scalars"])
    assert {"train/loss", "train/aux_loss", "train/routing/entropy", "train/tokens_per_second"} <= tags
    assert [event.step for event in held.Scalars("train/aux_loss")] == [1, 2]
    loads = [held.Scalars(f"train/load/layer_1/expert_{expert}")[-1].value for expert in range(4)]
    assert sum(loads) == pytest.approx(1)
    report = json.loads((tmp_path / "out" / "training.json").read_text())
    assert report["loads"]["1"] == pytest.approx(loads)
    assert not any("load/" in name for row in report["history"] for name in row)
    assert "load/" not in err


def test_a_dry_run_needs_no_other_processes(mixture, hf_moe_command, tmp_path):
    keys = keys_for("causal-lm", mixture("llama"), tmp_path, distributed={"fsdp_size": 2, "ep_size": 2})
    recipe = write_recipe(tmp_path / "recipe.yaml", keys | {"save_strategy": "no"})
    code, out, err = hf_moe_command("train", recipe, "--dry-run", "--json")
    assert code == 0, err
    assert json.loads(out)["trains"]["share"] == 1
    code, _, err = hf_moe_command(
        "train", recipe, "--dry-run", "--distributed.ep_size", "3", "--distributed.fsdp_size", 3
    )
    assert (code, "does not divide" in err) == (2, True), err
    code, _, err = hf_moe_command("train", recipe)
    assert (code, "make 2 processes, but 1 were started" in err) == (2, True), err


def test_router_settings_reach_the_routers(mixture, hf_moe_command, tmp_path):
    said = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.25, "dropout": 0.2, "router_jitter_noise": 0.1}
    keys = keys_for("causal-lm", mixture("gpt2"), tmp_path, config_overrides={"layer_norm_epsilon": 1e-4}, **said)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["router_aux_loss_coef"] == 0.5
    assert config["resid_pdrop"] == config["embd_pdrop"] == config["attn_pdrop"] == 0.2
    assert config["layer_norm_epsilon"] == 1e-4
    log = json.loads((tmp_path / "out" / "training.json").read_text())["history"][0]
    weighted = 0.5 * log["aux_loss"] + 0.25 * log["z_loss"]
    assert log["loss"] == pytest.approx(log["task_loss"] + weighted, rel=1e-5)


@pytest.mark.parametrize("recipe", packaged(), ids=lambda file: file.stem)
def test_packaged_recipes_run_as_they_stand(recipe, dense_folder, mixture, hf_moe_command, tmp_path, monkeypatch):
    read = TrainRecipe.from_yaml(recipe)
    family = TASKS[read.data.task]
    model = dense_folder(family) if read.model.upcycle or read.model.from_scratch else mixture(family)
    (tmp_path / "model").symlink_to(model)
    for split in ("train", "validation"):
        write_rows(tmp_path / f"{split}.jsonl", read.data.task, 40 if split == "train" else 8)
    monkeypatch.chdir(tmp_path)
    code, out, _ = hf_moe_command("recipes", "--json")
    assert code == 0
    assert len(json.loads(out)[recipe.stem]) > 10
    short = ["--doc_stride", 4] if read.data.task == "question-answering" else []  # the model has 64 positions
    code, _, err = hf_moe_command("train", recipe.stem, "--max_steps", 2, *short)
    assert code == 0, err
    assert (tmp_path / "trained" / "model.safetensors").exists()


def test_a_new_head_is_drawn_by_the_seed(mixture, tmp_path):
    def run(name, seed):
        folder = tmp_path / name
        folder.mkdir()
        keys = keys_for("text-classification", mixture("bert"), folder, seed=seed, max_steps=1)
        train(TrainRecipe.from_dict(keys), quiet=True)
        return (folder / "out" / "model.safetensors").read_bytes()

    first = run("first", 1)
    torch.rand(3)
    assert run("again", 1) == first
    assert run("other", 2) != first


def test_what_is_new_in_the_body_trains_beside_an_adapter(mixture, tmp_path):
    """A masked language model has no pooler, which a classifier needs."""
    from peft import PeftModel

    made = train(recipe_for("text-classification", mixture("bert"), tmp_path, peft="attention"), quiet=True)
    assert any("pooler" in name for name in made.report["trains"]["new"])
    ids, logits = torch.arange(5, 15)[None], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        base = hf_moe.BertMoeForSequenceClassification.from_pretrained(mixture("bert"))
        with torch.no_grad():
            logits.append(PeftModel.from_pretrained(base, made.path).eval()(input_ids=ids).logits)
    assert torch.equal(*logits)


def test_a_metric_that_few_rows_have_is_found(mixture, tmp_path):
    keys = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "f1_unanswerable"}
    recipe = recipe_for("question-answering", mixture("bert"), tmp_path, max_steps=1, **keys)
    row = {"question": "who", "context": "the dog sat", "answers": {"text": ["the"], "answer_start": [0]}}
    last = row | {"answers": {"text": [], "answer_start": []}}
    rows = [row] * 9 + [last]
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "eval_f1_unanswerable" in train(recipe, quiet=True).metrics


def test_adapters_train_and_are_saved(mixture, hf_moe_command, tmp_path):
    from peft import PeftModel

    peft = {"preset": "attention+experts", "r": 2}
    keys = keys_for("causal-lm", mixture("gpt2"), tmp_path, peft=peft, learning_rate=1e-2)
    code, out, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys), "--json")
    assert code == 0, err
    assert json.loads(out)["trains"]["share"] < 0.5
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    base = hf_moe.GPT2MoeLMHeadModel.from_pretrained(mixture("gpt2"))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, tmp_path / "out").merge_and_unload().state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, merged[name])}
    assert any(".experts." in name for name in moved)
    assert not any(".gate." in name for name in moved)


def test_what_is_streamed_trains(mixture, hf_moe_command, tmp_path):
    keys = keys_for("causal-lm", mixture("gpt2"), tmp_path, streaming=True, packing=True, max_length=16)
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys))
    assert code == 0, err
    assert json.loads((tmp_path / "out" / "training.json").read_text())["tokens"] == 2 * 4 * 16
    del keys["max_steps"]
    code, _, err = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys), "--overwrite")
    assert code == 2
    assert "max_steps has to be specified" in err


def test_importing_the_commands_leaves_training_alone():
    script = "import sys, hf_moe.cli; print([n for n in ('hf_moe.training.trainer', 'datasets') if n in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran.stderr
