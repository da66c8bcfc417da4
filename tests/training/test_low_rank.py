"""A dense checkpoint to a trained mixture of low rank in one command; and layouts that can't be, in one line."""

import json

import torch
from safetensors.torch import load_file

import hf_moe
from tests.conftest import batch, save_processors, tiny_moe
from tests.training.runs import keys_for, write_recipe


def changed(before, after):
    return {name for name, tensor in after.items() if name not in before or not torch.equal(before[name], tensor)}


def test_only_the_differences_and_the_routers_train(dense_folder, tmp_path, hf_moe_command):
    upcycle = {"num_experts": 4, "expert_rank": 2}
    keys = keys_for(
        "causal-lm", dense_folder("gpt2"), tmp_path, upcycle=upcycle, freeze="low_rank_only", learning_rate=0.01
    )
    code, _, error = hf_moe_command("train", write_recipe(tmp_path / "recipe.yaml", keys), "-q")
    assert code == 0, error
    start = hf_moe.upcycle(dense_folder("gpt2"), tmp_path / "start", verify=False, **upcycle)
    before, after = (load_file(folder / "model.safetensors") for folder in (start.path, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = changed(before, after)
    assert {name.rpartition(".")[2] for name in moved} >= {"up_proj_b", "down_proj_b"}
    assert all(name.endswith(("_proj_a", "_proj_b", ".gate.weight")) for name in moved)

    whole = hf_moe.expand_experts(tmp_path / "out", tmp_path / "whole")
    models = [hf_moe.GPT2MoeLMHeadModel.from_pretrained(folder).eval() for folder in (tmp_path / "out", whole.path)]
    one, other = (model(**batch("gpt2")).logits for model in models)
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_experts_of_their_own_have_no_differences_to_train(tmp_path, hf_moe_command):
    refused(tmp_path, hf_moe_command, "upcycle with expert_rank", freeze="low_rank_only")


def test_a_layout_that_can_not_be_is_refused_before_it_starts(tmp_path, hf_moe_command):
    refused(tmp_path, hf_moe_command, "make 2 processes, but 1 were started", distributed={"fsdp_size": 2})


def refused(tmp_path, hf_moe_command, why, **keys):
    tiny_moe("gpt2").save_pretrained(tmp_path / "moe")
    save_processors("gpt2", tmp_path / "moe")
    recipe = write_recipe(tmp_path / "recipe.yaml", keys_for("causal-lm", tmp_path / "moe", tmp_path, **keys))
    code, _, error = hf_moe_command("train", recipe)
    assert code == 2
    assert why in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["num_experts"] == 4
