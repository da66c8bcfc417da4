"""A model that was shared out goes on with another number of processes; and one that travels without hf_moe."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from transformers.distributed import DistributedConfig
from transformers.distributed.checkpoint import load_optimizer_distributed, save_optimizer_distributed

import hf_moe
from tests.conftest import tiny_moe
from tests.modeling.distributed import in_processes
from tests.training.test_parallel import LOSSES, ROWS, half, inputs, total_of

pytestmark = pytest.mark.multiprocess


def go_on(rank, world, source, output, optimizer_folder=None):
    """Two steps of AdamW on `world` processes; saves weights and the optimizer's state."""
    sizes = {"fsdp_size": world, "ep_size": world}
    loading = {"distributed_config": DistributedConfig(**sizes)} if world > 1 else {}
    model = hf_moe.LlamaMoeForCausalLM.from_pretrained(source, **loading).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    if optimizer_folder is not None:
        load_optimizer_distributed(model, optimizer, str(optimizer_folder))
    losses = []
    for _ in range(2):
        batch = inputs()
        total = total_of("llama", batch)
        loss = model(**(half(rank, batch) if world > 1 else batch), num_items_in_batch=total).loss
        (loss * world).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach()
        if world > 1:
            distributed.all_reduce(loss)
        losses.append(loss.item())
    model.save_pretrained(output)
    save_optimizer_distributed(model, optimizer, f"{output}-optimizer")
    return losses


def on_two(rank, root):
    """From the start, and from where one process left off, in one start of both processes."""
    begun = go_on(rank, 2, root / "start", root / "two")
    return begun, go_on(rank, 2, root / "one", root / "one-two", root / "one-optimizer")


def test_training_goes_on_with_more_and_fewer_processes(tmp_path):
    assert ROWS % 2 == 0
    tiny_moe("llama", **LOSSES).save_pretrained(tmp_path / "start")
    first = go_on(0, 1, tmp_path / "start", tmp_path / "one")
    then = go_on(0, 1, tmp_path / "one", tmp_path / "one-one", tmp_path / "one-optimizer")
    assert then[0] < first[0]
    for begun, more in in_processes(2, on_two, tmp_path):
        assert begun == pytest.approx(first, rel=1e-5)
        assert more == pytest.approx(then, rel=1e-4)
    fewer = go_on(0, 1, tmp_path / "two", tmp_path / "two-one", tmp_path / "two-optimizer")
    assert fewer == pytest.approx(then, rel=1e-4)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("one-one", "two-one", "one-two")]
    for name, weight in weights[0].items():
        for other in weights[1:]:
            torch.testing.assert_close(other[name], weight, rtol=1e-3, atol=1e-4)


STRANGER = """
import sys, torch
from torch.distributed.fsdp import FSDPModule
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

folder, output = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, distributed_config=DistributedConfig(fsdp_size=2, ep_size=2)
)
assert "hf_moe" not in sys.modules
assert isinstance(model, FSDPModule)
assert model.model.layers[0].mlp.experts.num_experts == 2
ids = torch.arange(5, 15)[None]
model.train()(input_ids=ids, labels=ids).loss.backward()
model.save_pretrained(output)
torch.distributed.destroy_process_group()
"""


def test_a_checkpoint_brings_its_plans_along(tmp_path):
    """Loaded by its own code on two processes, and saved: nothing of FSDP's is in it."""
    tiny_moe("llama", **LOSSES).save_pretrained(tmp_path / "first")
    script = tmp_path / "script.py"
    script.write_text(STRANGER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, script, tmp_path / "first", tmp_path / "second"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = tmp_path / "first", tmp_path / "second"
    assert {file.name for file in first.iterdir()} == {file.name for file in second.iterdir()}
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert configs[0]["architectures"] == configs[1]["architectures"]
    weights, again = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert all(torch.equal(weights[name], again[name]) for name in weights)
