"""A run that is killed goes on as if it had not been; with another recipe it does not go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from hf_moe.errors import SourceError, UsageError
from hf_moe.training import MoeTrainer, TrainRecipe, train
from hf_moe.training.checkpoints import STATE_NAME, is_whole, last_checkpoint, read_state, share_out
from tests.training.runs import keys_for, recipe_for, without_times, write_recipe

KILLED_AFTER = 4


def start(recipe):
    command = [sys.executable, "-m", "hf_moe", "train", str(recipe), "-q"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def wait_for(checkpoint, process, seconds=60.0):
    end = time.monotonic() + seconds
    while not is_whole(checkpoint):
        assert process.poll() is None, process.stderr.read().decode()
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def long_run(mixture, tmp_path):
    """Everything that is random or counted at once: masks, dropout, a router's bias, accumulation, early stopping,
    logs that do not fall on checkpoints, evaluations between."""
    model = mixture("bert", router_type="sigmoid")
    return keys_for(
        "masked-lm",
        model,
        tmp_path,
        max_steps=20,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        router_learning_rate=1e-2,
        warmup_steps=5,
        logging_steps=3,
        save_strategy="steps",
        save_steps=4,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        early_stopping_patience=20,
        dropout=0.1,
        freeze="gradual:3",
        router_bias_update_rate=0.01,
    )


def test_killed_half_way_and_resumed_it_is_the_same_run(long_run, hf_moe_command, tmp_path):
    whole = train(TrainRecipe.from_dict(long_run), quiet=True)
    killed = long_run | {"output_dir": str(tmp_path / "killed")}
    recipe, files = write_recipe(tmp_path / "recipe.yaml", killed), tmp_path / "killed.partial" / "files"
    process = start(recipe)
    wait_for(files / f"checkpoint-{KILLED_AFTER}", process)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    begun = last_checkpoint(files)
    assert begun is not None

    code, _, err = hf_moe_command("train", recipe)  # neither goes on by itself nor starts anew
    assert code == 2
    assert "--resume_from_checkpoint true goes on with it" in err
    code, _, err = hf_moe_command("train", recipe, "-q", "--resume_from_checkpoint", "true")
    assert code == 0, err
    assert not (tmp_path / "killed.partial").exists()

    one, other = (json.loads((folder / "training.json").read_text()) for folder in (whole.path, tmp_path / "killed"))
    losses = [row["loss"] for row in one["history"] if "loss" in row]
    assert len(losses) == 6
    assert len(set(losses)) == 6
    assert without_times(other["history"]) == without_times(one["history"])
    assert (whole.path / "model.safetensors").read_bytes() == (tmp_path / "killed" / "model.safetensors").read_bytes()
    for name in ("tokens", "active_flops", "best", "steps", "data"):
        assert other[name] == one[name], name


def test_resuming_where_an_epoch_ends(mixture, tmp_path):
    def run(folder, **keys):
        folder.mkdir(exist_ok=True)
        made = keys_for("masked-lm", mixture("bert"), folder, dropout=0.2, learning_rate=1e-3)
        made |= {"max_steps": 6, "per_device_train_batch_size": 8, "save_strategy": "steps", "save_steps": 1}
        return train(TrainRecipe.from_dict(made | keys), quiet=True)

    whole = run(tmp_path / "whole")
    for step in (2, 3, 4):  # inside an epoch, at its end, after it
        checkpoint = shutil.copytree(whole.path / f"checkpoint-{step}", tmp_path / f"from-{step}")
        again = run(tmp_path / f"again-{step}", resume_from_checkpoint=str(checkpoint))
        assert without_times(again.report["history"]) == without_times(whole.report["history"])


@pytest.mark.parametrize(
    ("task", "family", "keys"),
    [
        ("causal-lm", "gpt2", {"streaming": True, "packing": True, "max_length": 16}),
        ("masked-lm", "bert", {"streaming": True, "max_steps": 10, "gradient_accumulation_steps": 2}),
        ("masked-lm", "bert", {"train_sampling_strategy": "group_by_length", "max_steps": 10, "dropout": 0.1}),
        ("causal-lm", "gpt2", {"peft": {"preset": "attention+experts", "r": 2}}),
        ("sentence-embedding", "bert", {"dropout": 0.1}),
        ("text-classification", "llama", {"optim": "sgd", "freeze": "experts_only"}),
    ],
    ids=["streamed", "streamed again", "grouped", "adapters", "embedding", "classes"],
)
def test_other_runs_resume_too(task, family, keys, mixture, tmp_path):
    made = keys_for(task, mixture(family), tmp_path, save_strategy="steps", save_steps=1, learning_rate=1e-2)
    made |= {"max_steps": 4, **keys}
    whole = train(TrainRecipe.from_dict(made), quiet=True)
    checkpoint = str(whole.path / f"checkpoint-{made['max_steps'] - 2}")
    again = made | {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": checkpoint}
    report = train(TrainRecipe.from_dict(again), quiet=True).report
    assert without_times(report["history"]) == without_times(whole.report["history"])


def test_interrupted_after_upcycling_it_goes_on(dense_folder, tmp_path, monkeypatch):
    keys = keys_for("causal-lm", dense_folder("gpt2"), tmp_path, upcycle={"num_experts": 4, "drop_ratio": 0.5})
    keys |= {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "dropout": 0.1}
    whole = train(TrainRecipe.from_dict(keys | {"output_dir": str(tmp_path / "whole")}), quiet=True)
    step = MoeTrainer.training_step

    def interrupted(self, *args, **kwargs):
        if self.state.global_step == 2:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MoeTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainRecipe.from_dict(keys), quiet=True)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    files = tmp_path / "out.partial" / "files"
    broken = shutil.copytree(files / "checkpoint-2", files / "checkpoint-3")  # as if killed while it was written
    (broken / "trainer_state.json").unlink()
    again = train(TrainRecipe.from_dict(keys | {"resume_from_checkpoint": True}), quiet=True)
    assert without_times(again.report["history"]) == without_times(whole.report["history"])
    assert is_whole(tmp_path / "out" / "checkpoint-3")
    assert not (tmp_path / "out.partial").exists()


@pytest.fixture(scope="module")
def finished(mixture, tmp_path_factory):
    """(folder, keys) of a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("finished")
    keys = keys_for("masked-lm", mixture("bert"), folder, save_strategy="steps", save_steps=1)
    train(TrainRecipe.from_dict(keys), quiet=True)
    return folder, keys | {"resume_from_checkpoint": str(folder / "out" / "checkpoint-1")}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"learning_rate": 0.5}, "made by another recipe: learning_rate was 5e-05"),
        ({"freeze": "experts_only", "seed": 3}, "seed was 0"),
        ({"max_steps": 9}, "max_steps was 2 (a longer run needs a schedule without an end, such as constant)"),
        ({"warmup_steps": 1, "eval_delay": 2}, "eval_delay was None"),
    ],
)
def test_another_recipe_does_not_go_on(changed, words, finished, tmp_path):
    _, keys = finished
    recipe = TrainRecipe.from_dict({**keys, "output_dir": str(tmp_path / "other"), **changed})
    with pytest.raises(UsageError) as raised:
        train(recipe, quiet=True)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_other_data_does_not_go_on(finished, tmp_path):
    folder, keys = finished
    file = tmp_path / "train.jsonl"
    file.write_text((folder / "train.jsonl").read_text() + '{"text": "the dog"}\n')
    recipe = TrainRecipe.from_dict({**keys, "output_dir": str(tmp_path / "other"), "train_file": str(file)})
    with pytest.raises(UsageError, match="made with other data: files differ"):
        train(recipe, quiet=True)


def test_what_is_only_told_may_differ(finished, tmp_path):
    _, keys = finished
    free = {"output_dir": str(tmp_path / "other"), "logging_steps": 2, "save_strategy": "no"}
    free["report_to"] = "tensorboard"
    made = train(TrainRecipe.from_dict({**keys, **free}), quiet=True)
    assert made.report["steps"] == 2
    logged = [row["step"] for row in made.report["history"] if "loss" in row]
    assert logged == [1, 2]
    assert not list(made.path.glob("checkpoint-*"))


@pytest.mark.parametrize("early", [False, True])
def test_nothing_is_done_after_the_end(early, mixture, tmp_path):
    """A process that ended between its last checkpoint and the output."""
    keys = keys_for("masked-lm", mixture("bert"), tmp_path, save_strategy="steps", save_steps=1, max_steps=4)
    if early:
        keys |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "max_steps": 9}
        keys |= {"early_stopping_patience": 1, "learning_rate": 3.0, "optim": "sgd", "max_grad_norm": 0.0}
    whole = train(TrainRecipe.from_dict(keys), quiet=True)
    last = whole.report["steps"]
    assert (last < 9) == early or last == 4
    again = {"output_dir": str(tmp_path / "again"), "resume_from_checkpoint": str(whole.path / f"checkpoint-{last}")}
    resumed = train(TrainRecipe.from_dict(keys | again), quiet=True)
    assert resumed.report["steps"] == last
    assert without_times(resumed.report["history"]) == without_times(whole.report["history"])
    weights = [(made.path / "model.safetensors").read_bytes() for made in (whole, resumed)]
    assert weights[0] == weights[1]


def test_on_another_number_of_processes_a_step_has_as_many_rows(finished, tmp_path):
    """The checkpoint is made to say that two processes wrote it."""
    folder, keys = finished
    checkpoint = shutil.copytree(folder / "out" / "checkpoint-1", tmp_path / "checkpoint-1")
    state = json.loads((checkpoint / STATE_NAME).read_text())
    (checkpoint / STATE_NAME).write_text(json.dumps(state | {"processes": state["processes"] * 2}))
    keys = {**keys, "resume_from_checkpoint": str(checkpoint), "output_dir": str(tmp_path / "other")}
    with pytest.raises(
        UsageError, match=r"made by 2 processes of 4 rows a step each; 1 take as many where .* is 8\.$"
    ):
        train(TrainRecipe.from_dict(keys), quiet=True)
    grouped = {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"}
    with pytest.raises(UsageError, match="on whose number group_by_length depends"):
        train(TrainRecipe.from_dict(keys | grouped), quiet=True)
    for changed in ({"per_device_train_batch_size": 8}, {"gradient_accumulation_steps": 2}):
        made = train(
            TrainRecipe.from_dict(keys | changed | {"output_dir": str(tmp_path / next(iter(changed)))}), quiet=True
        )
        assert made.report["steps"] == 2


def test_going_on_from_elsewhere_spares_what_was_interrupted(finished, tmp_path):
    _, keys = finished
    files = tmp_path / "other.partial" / "files"
    shutil.copytree(finished[0] / "out", files)
    recipe = TrainRecipe.from_dict({**keys, "output_dir": str(tmp_path / "other")})
    with pytest.raises(UsageError, match="is an interrupted run"):
        train(recipe, quiet=True)
    assert is_whole(files / "checkpoint-1")


def test_a_constant_rate_may_go_on_longer(mixture, tmp_path):
    constant = {"lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    short = keys_for("causal-lm", mixture("gpt2"), tmp_path, **constant)
    train(TrainRecipe.from_dict(short), quiet=True)
    more = {"max_steps": 4, "resume_from_checkpoint": str(tmp_path / "out" / "checkpoint-2")}
    longer = train(TrainRecipe.from_dict({**short, **more, "output_dir": str(tmp_path / "longer")}), quiet=True)
    at_once = train(TrainRecipe.from_dict({**short, "max_steps": 4, "output_dir": str(tmp_path / "once")}), quiet=True)
    losses = [[row["loss"] for row in made.report["history"] if "loss" in row] for made in (longer, at_once)]
    assert losses[0] == losses[1]


def test_what_is_no_checkpoint(mixture, tmp_path, finished):
    def attempt(**keys):
        with pytest.raises(UsageError) as raised:
            train(recipe_for("masked-lm", mixture("bert"), tmp_path, **keys), quiet=True)
        return str(raised.value)

    assert "there is no whole checkpoint to resume from" in attempt(resume_from_checkpoint=True)
    assert "is no whole checkpoint." in attempt(resume_from_checkpoint=str(tmp_path))
    beside = finished[0] / "out"
    assert f"{beside / 'checkpoint-2'} is one" in attempt(resume_from_checkpoint=str(beside))
    broken = shutil.copytree(beside / "checkpoint-1", tmp_path / "checkpoint-1")
    (broken / "trainer_state.json").write_text('{"half": ')
    assert "is no whole checkpoint." in attempt(resume_from_checkpoint=str(broken))
    with pytest.raises(SourceError, match="is no whole checkpoint"):
        read_state(broken)
    assert not (tmp_path / "out.partial").exists()


def test_auto_starts_where_there_is_nothing_to_resume(mixture, tmp_path):
    recipe = recipe_for("masked-lm", mixture("bert"), tmp_path, resume_from_checkpoint="auto")
    assert train(recipe, quiet=True).report["steps"] == 2


def test_notes_of_processes_are_shared_out():
    one = {"loss": 2.0, "Figures": {"sums": {"aux_loss": 1.0}, "tokens": 5, "tokens_seen": 9, "seconds": 1.0}}
    one["RoutingMonitor"] = {"warned": False, "streak": {"0": 1}, "counts": {"0": [1, 2]}}
    two = {"loss": 4.0, "Figures": {"sums": {"aux_loss": 3.0}, "tokens": 7, "tokens_seen": 9, "seconds": 1.0}}
    two["RoutingMonitor"] = {"warned": False, "streak": {"0": 1}, "counts": {"0": [10, 20]}}
    assert share_out([one, two], 2) == [one, two]
    [joined] = share_out([one, two], 1)
    assert joined["loss"] == 3.0
    assert joined["Figures"] == {"sums": {"aux_loss": 2.0}, "tokens": 12, "tokens_seen": 9, "seconds": 1.0}
    assert joined["RoutingMonitor"]["counts"] == {"0": [11, 22]}
    parts = share_out([one], 3)
    assert [part["loss"] for part in parts] == [2.0, 2.0, 2.0]
    assert [part["Figures"]["tokens"] for part in parts] == [5, 0, 0]
    assert [part["Figures"]["sums"] for part in parts] == [{"aux_loss": 1.0}] * 3
    assert [part["RoutingMonitor"]["counts"] for part in parts] == [{"0": [1, 2]}, {}, {}]
