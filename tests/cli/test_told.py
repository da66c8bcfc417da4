"""What `hf-moe train` tells on standard error, and what `-q` leaves of it; errors of several processes."""

import os
import re
import socket
import subprocess
import sys

import pytest

import hf_moe
from hf_moe import cli
from tests.training.runs import keys_for, write_recipe

FROZEN = {"freeze": [r"mlp\."]}  # patterns: every expert, and every router


@pytest.fixture(scope="module")
def mixture(dense_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture") / "gpt2"
    hf_moe.upcycle(dense_folder("gpt2"), folder, num_experts=4, noise_std=0.3, verify=False)
    return folder


@pytest.fixture
def recipe(mixture, tmp_path):
    """(**keys) -> a recipe of two steps."""
    return lambda **keys: write_recipe(tmp_path / "recipe.yaml", keys_for("causal-lm", mixture, tmp_path, **keys))


def test_what_trains_is_told_before_the_first_step(recipe, hf_moe_command):
    code, out, err = hf_moe_command("train", recipe(freeze="experts_only"))
    assert code == 0, err
    lines = err.splitlines()
    [told] = [place for place, line in enumerate(lines) if line.startswith("trains: ")]
    first = next(place for place, line in enumerate(lines) if line.startswith("step 1/2: "))
    assert told < first
    assert re.search(r"trains: \d+ tensors, [\d,]+ of [\d,]+ parameters \(\d+.\d%\): ", lines[told])
    assert "router 0 of 384" in lines[told]
    assert lines[told].removeprefix("trains: ") in " ".join(out.split())  # as after it


def test_a_log_has_the_cost_and_the_ends_of_the_loads(recipe, hf_moe_command):
    code, _, err = hf_moe_command("train", recipe())
    assert code == 0, err
    logs = [line for line in err.splitlines() if " loss " in line]
    assert len(logs) == 2
    for line in logs:
        figures = dict(re.findall(r"(\S+) ([\d.e+-]+)(?= |$)", line))
        assert 0 <= float(figures["load_min"]) <= 1 / 4 <= float(figures["load_max"]) <= 1 / 2
        assert float(figures["active_flops"]) > 1e6


def test_quiet_is_quiet_about_frozen_experts_too(recipe, hf_moe_command, caplog):
    code, _, err = hf_moe_command("train", recipe(**FROZEN), "-q")
    assert (code, err) == (0, "")
    assert not caplog.records
    code, _, err = hf_moe_command("train", recipe(**FROZEN), "--overwrite")
    assert code == 0, err
    assert "All experts stay frozen" in caplog.text


def test_one_process_tells_what_all_ran_into(recipe, hf_moe_command, monkeypatch):
    waited = []
    monkeypatch.setattr(cli.time, "sleep", waited.append)
    wrong = recipe(freeze="nothing")
    monkeypatch.setenv("RANK", "0")
    code, _, err = hf_moe_command("train", wrong)
    assert (code, waited) == (2, [])
    assert "Error: freeze" in err
    monkeypatch.setenv("RANK", "1")
    code, _, err = hf_moe_command("train", wrong)
    assert (code, waited) == (2, [cli.ALONE])
    assert "Error (rank 1): freeze" in err  # nobody has ended it: the error is its own


@pytest.mark.multiprocess
def test_an_error_is_told_once_under_torchrun(recipe):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port]
    command = [sys.executable, *launcher, "-m", "hf_moe", "train", recipe(), "--colour", 1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    [told] = re.findall(r"^Error.*", done.stderr, re.MULTILINE)
    assert "unknown key 'colour'" in told
