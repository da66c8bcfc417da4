"""The same recipe on one process, under `accelerate launch` and under `torchrun`: the same curve."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from hf_moe import recipes
from tests.training.runs import keys_for, write_recipe

pytestmark = pytest.mark.multiprocess

CPU = Path(recipes.__file__).parent / "accelerate" / "cpu.yaml"
SAME_STEP = {"max_steps": 3, "router_aux_loss_scope": "global_batch", "dropout": 0.0, "optim": "sgd"}


def start(command, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), env=environment, cwd=cwd, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-3000:]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def curve(folder):
    """Losses and gradient norms of every step."""
    history = json.loads((folder / "training.json").read_text())["history"]
    return [value for row in history for name, value in row.items() if name in ("loss", "aux_loss", "grad_norm")]


@pytest.fixture(scope="module")
def recipe(mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    keys = keys_for("causal-lm", mixture("llama"), folder, max_length=8, packing=True, **SAME_STEP)
    return write_recipe(folder / "recipe.yaml", keys)


@pytest.fixture(scope="module")
def one(recipe):
    train = [sys.executable, "-m", "hf_moe", "train", recipe, "--output_dir", recipe.parent / "one"]
    start([*train, "--per_device_train_batch_size", 4], recipe.parent)
    return recipe.parent / "one"


LAUNCHERS = {
    "accelerate launch": lambda: ["-m", "accelerate.commands.launch", "--config_file", CPU],
    "torchrun": lambda: ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port()],
}
SHARED = ["--distributed.fsdp_size", 2, "--distributed.ep_size", 2, "--save_only_model"]


@pytest.mark.parametrize(
    ("launcher", "options"),
    [("accelerate launch", []), ("torchrun", SHARED)],
    ids=["accelerate launch", "torchrun, experts on both"],
)
def test_two_processes_train_as_one(launcher, options, recipe, one):
    output = recipe.parent / f"two-{launcher.split()[0]}-{len(options)}"
    command = [sys.executable, *LAUNCHERS[launcher]()]
    if launcher == "accelerate launch":
        command += ["--main_process_port", free_port()]
    command += ["-m", "hf_moe", "train", recipe, "--output_dir", output, "--per_device_train_batch_size", 2, *options]
    start(command, recipe.parent)
    report = json.loads((output / "training.json").read_text())
    assert (report["processes"], report["distributed"]) == (2, "MULTI_CPU")
    assert curve(output) == pytest.approx(curve(one), rel=1e-4)
    names = {file.name for file in one.iterdir() if file.is_file()}
    assert names == {file.name for file in output.iterdir() if file.is_file()}
