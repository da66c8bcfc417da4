"""Two processes on a CPU do what one does: same loss, same gradients, same checkpoint, whatever is shared out."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

import hf_moe
from hf_moe.modeling.moe_experts import MoeExperts
from tests.conftest import lm_class, tiny_moe
from tests.modeling.distributed import in_processes

pytestmark = pytest.mark.multiprocess

ROWS, LENGTH, EXPERTS = 4, 10, 4
STILL = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "llama": {},
}
LOSSES = {"router_aux_loss_coef": 0.5, "router_z_loss_coef": 0.1, "router_aux_loss_scope": "global_batch"}
LAYOUTS = {
    "fsdp": {"fsdp_size": 2},
    "fsdp and experts": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "neurons": {"tp_size": 2},
    "tensors and experts": {"tp_size": 2, "ep_size": 2},
}
# (what, family, layout, further configuration)
RUNS = [
    ("biased", "bert", "fsdp", {}),
    ("biased", "bert", "fsdp and experts", {}),
    ("other labels", "bert", "fsdp", {"router_z_loss_coef": 0.0}),
    ("tied", "gpt2", "fsdp and experts", {}),
    ("gated", "llama", "fsdp", {}),
    ("gated", "llama", "fsdp and experts", {}),
    ("gated", "llama", "neurons", {}),
    ("gated", "llama", "tensors and experts", {}),
    ("starved", "llama", "fsdp and experts", {}),
    ("empty slots", "llama", "fsdp and experts", {"router_type": "top_p"}),
    ("shared", "llama", "fsdp and experts", {"shared_expert_intermediate_size": 16}),
    ("low rank", "llama", "fsdp", {"expert_rank": 2}),
]
IDS = [f"{what}, {layout}" for what, _, layout, _ in RUNS]


def folder_of(root, run):
    return root / f"{run[1]}-{run[0].replace(' ', '-')}"


def inputs(what=""):
    """A batch of which each process takes two rows; "other labels" are not as many in both."""
    ids = torch.randint(5, 60, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    if what == "starved":
        ids = torch.full_like(ids, 7)
    labels = ids.clone()
    if what == "other labels":
        labels[:2, 3:] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def step(model, batch, total, world):
    """Loss and gradients of a share of a step, as Trainer has them."""
    loss = model.train()(**batch, num_items_in_batch=total).loss
    (loss * world).backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    whole = {n: None if g is None else g.full_tensor() if isinstance(g, DTensor) else g for n, g in grads.items()}
    return loss.detach(), whole


def half(rank, batch):
    return {name: value[2 * rank : 2 * rank + 2] for name, value in batch.items()}


def total_of(family, batch):
    labels = batch["labels"] if family == "bert" else batch["labels"][:, 1:]
    return int(labels.ne(-100).sum())


def run_all(rank, root):
    return [run_one(rank, root, run) for run in RUNS]


def run_one(rank, root, run):
    what, family, layout, _ = run
    model_class = getattr(hf_moe, lm_class(family))
    model = model_class.from_pretrained(folder_of(root, run), distributed_config=DistributedConfig(**LAYOUTS[layout]))
    batch = inputs(what)
    sharing = "fsdp" in layout  # under tensor parallelism all processes have the whole batch
    loss, grads = step(model, half(rank, batch) if sharing else batch, total_of(family, batch), 2 if sharing else 1)
    if sharing:
        distributed.all_reduce(loss)
    saved = root / f"saved-{IDS[RUNS.index(run)]}"
    model.save_pretrained(saved)
    experts = [module for module in model.modules() if isinstance(module, MoeExperts)]
    weights = [module.gate_up_proj if module.has_gate else module.up_proj for module in experts]
    return {
        "loss": loss,
        "grads": grads,
        "is_fsdp": isinstance(model, FSDPModule),
        "sharded": {name: isinstance(p, DTensor) for name, p in model.named_parameters()},
        "experts": [module.num_experts for module in experts],
        "local": [tuple(weight.to_local().shape) for weight in weights],
        "placed": [str(weight.placements) for weight in weights],
        "meshes": [weight.device_mesh.mesh_dim_names for weight in weights],
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint for each kind of run."""
    root = tmp_path_factory.mktemp("parallel")
    for run in RUNS:
        what, family, _, config = run
        if not folder_of(root, run).exists():
            model = tiny_moe(family, **{**STILL[family], **LOSSES, **config})
            if what == "starved":  # every token to the same experts
                with torch.no_grad():
                    for module in model.modules():
                        if hasattr(module, "e_score_correction_bias"):
                            module.weight.zero_()
            model.save_pretrained(folder_of(root, run))
    return root


@pytest.fixture(scope="module")
def results(folders):
    """Of each run what both processes found. One start of two processes for all: it costs more than they do."""
    by_rank = in_processes(2, run_all, folders)
    return {name: [found[i] for found in by_rank] for i, name in enumerate(IDS)}


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_loss_and_all_gradients_are_those_of_one_process(run, folders, results):
    what, family, _, _ = run
    model = getattr(hf_moe, lm_class(family)).from_pretrained(folder_of(folders, run))
    batch = inputs(what)
    loss, grads = step(model, batch, total_of(family, batch), 1)
    assert max(float(g.abs().max()) for g in grads.values() if g is not None) > 1e-3
    for found in results[IDS[RUNS.index(run)]]:
        torch.testing.assert_close(found["loss"], loss, rtol=1e-5, atol=1e-6)
        assert found["grads"].keys() == grads.keys()
        for name, grad in grads.items():
            got = found["grads"][name]
            if got is None or grad is None:
                assert not any(g is not None and g.any() for g in (got, grad)), name
            else:
                torch.testing.assert_close(got, grad, rtol=1e-4, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_what_runs_is_what_was_asked_for(run, results):
    _, _, layout, config = run
    for found in results[IDS[RUNS.index(run)]]:
        assert found["is_fsdp"] == ("fsdp" in layout)
        if "fsdp" in layout:
            assert all(found["sharded"].values())
        if config.get("expert_rank"):
            continue
        held, dim = (EXPERTS // 2, 0) if "experts" in layout else (EXPERTS, 0 if layout == "fsdp" else 1)
        assert found["experts"] == [held] * 2
        assert {shape[0] for shape in found["local"]} == {EXPERTS if dim else EXPERTS // 2}
        assert all(f"dim={dim}" in placed or f"S({dim})" in placed for placed in found["placed"])
        assert all(("ep" in names) == ("experts" in layout) for names in found["meshes"])


@pytest.mark.parametrize("run", RUNS, ids=IDS)
def test_what_is_saved_is_an_ordinary_checkpoint(run, folders, results):
    before, after = folder_of(folders, run), folders / f"saved-{IDS[RUNS.index(run)]}"
    assert {file.name for file in before.iterdir()} == {file.name for file in after.iterdir()}
    weights, again = (load_file(folder / "model.safetensors") for folder in (before, after))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (before, after)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert "FSDP" not in (after / "config.json").read_text()
    for file in before.glob("*.py"):
        assert file.read_bytes() == (after / file.name).read_bytes()


def test_a_starved_process_is_starved(results):
    """No token went to any of its experts, in any layer; it took part, or the other would have waited for ever."""
    for found in results["starved, fsdp and experts"]:
        for name, grad in found["grads"].items():
            if name.endswith("experts.down_proj"):
                by_process = grad.flatten(1).any(1).view(2, -1).any(1)
                assert by_process.sum() == 1, name
