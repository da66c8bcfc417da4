"""What several devices are told of a mixture, and what is refused before they wait for each other."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DeepSpeedPlugin
from transformers import BertConfig, MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hf_moe.errors import UsageError
from hf_moe.modeling.moe_layers import MoeBlock
from hf_moe.recipes import __file__ as recipes_file
from hf_moe.training.distributed import LEAF_CLASSES, distributed_config, leaf_classes, set_leaf_modules
from tests.conftest import tiny_moe

ACCELERATE = sorted((Path(recipes_file).parent / "accelerate").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")


def tiny_mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
        )
    )


@pytest.mark.parametrize("make", [lambda: tiny_moe("bert"), tiny_mixtral], ids=["ours", "Mixtral"])
def test_experts_are_shared_out_evenly(make):
    config = make().config
    assert distributed_config(config, fsdp_size=8, ep_size=4).ep_size == 4
    with pytest.raises(UsageError, match=r"ep_size 8 are more processes than the 4 experts .* 1, 2, 4 would do"):
        distributed_config(config, fsdp_size=8, ep_size=8)


def test_impossible_layouts_are_refused_in_a_line(monkeypatch):
    config = tiny_moe("bert", num_experts=6).config
    for sizes, why in [
        ({"fsdp_size": 8, "ep_size": 4}, "ep_size 4 does not divide the 6 experts of a layer"),
        ({"fsdp_size": 2}, "make 2 processes, but 8 were started; use `torchrun --nproc-per-node 2`"),
        ({"fsdp_size": 8, "ep_size": 3}, "must divide `fsdp_size"),
        ({"fsdp_sizes": 8}, "fsdp_sizes"),
        ({"fsdp_size": 0}, "must be >= 1"),
    ]:
        with pytest.raises(UsageError, match=why) as caught:
            distributed_config(config, **sizes)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="a bert has no experts"):
        distributed_config(BertConfig(), fsdp_size=8, ep_size=2)
    with pytest.raises(UsageError, match="no plan of how experts are shared out"):
        distributed_config(tiny_moe("bert", expert_rank=2).config, fsdp_size=8, ep_size=2)


def accelerator(**plugin):
    return SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(**plugin) if plugin else None))


def test_blocks_are_leaves_for_zero_3(monkeypatch):
    model = tiny_moe("bert")
    assert leaf_classes(model) == ["MoeBlock"]
    assert leaf_classes(tiny_mixtral()) == ["MixtralSparseMoeBlock"]
    set_leaf_modules(model, accelerator())  # without DeepSpeed nothing happens
    made = accelerator(transformer_moe_cls_names=None)
    set_leaf_modules(model, made)
    assert made.state.deepspeed_plugin.transformer_moe_cls_names == "MoeBlock"
    users = accelerator(transformer_moe_cls_names="Mine")
    set_leaf_modules(model, users)
    assert users.state.deepspeed_plugin.transformer_moe_cls_names == "Mine"
    monkeypatch.setenv(LEAF_CLASSES, "Mine")
    made = accelerator(transformer_moe_cls_names=None)
    set_leaf_modules(model, made)
    assert made.state.deepspeed_plugin.transformer_moe_cls_names is None


def test_accelerate_hands_the_blocks_to_deepspeed(monkeypatch):
    """DeepSpeed's function is stood in for, what calls it is Accelerate's. (The real one: benchmarks/zero3.py.)"""
    told = []
    stand_in = SimpleNamespace(set_z3_leaf_modules=lambda model, classes: told.append((model, classes)))
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(utils=stand_in))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", stand_in)
    monkeypatch.setattr("accelerate.utils.dataclasses.compare_versions", lambda *a: False)
    for model, block in ((tiny_moe("gpt2"), MoeBlock), (tiny_mixtral(), MixtralSparseMoeBlock)):
        plugin = SimpleNamespace(transformer_moe_cls_names=None)
        set_leaf_modules(model, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))
        DeepSpeedPlugin.set_moe_leaf_modules(plugin, model)
        assert told.pop() == (model, [block])


def test_zero_3_was_as_one_process():
    """What benchmarks/zero3.py wrote, with the real DeepSpeed."""
    for run in json.loads((Path(__file__).parents[2] / "benchmarks" / "zero3.json").read_text())["runs"]:
        assert (run["distributed_type"], run["processes"], run["sharded"]) == ("DEEPSPEED", 2, True)
        assert max(run["loss_difference"], run["gradient_difference"]) < 1e-6


@pytest.mark.parametrize("file", ACCELERATE, ids=lambda file: file.name)
def test_accelerate_reads_its_recipes(file):
    config = load_config_from_file(str(file))
    assert (
        config.distributed_type.name
        == {
            "cpu": "MULTI_GPU",  # for the launcher; what runs is in test_launchers.py
            "ddp": "MULTI_GPU",
            "deepspeed_zero3": "DEEPSPEED",
            "fsdp2": "FSDP",
        }[file.stem]
    )
    assert config.num_processes == 2
    assert set(yaml.safe_load(file.read_text())) >= {"distributed_type", "num_processes", "mixed_precision"}


def test_a_mixtures_layers_are_those_that_fsdp_gathers():
    """The recipe of FSDP names no layer: Accelerate takes those of the model, which must be there."""
    for family in ("bert", "gpt2", "llama"):
        model = tiny_moe(family)
        held = {type(module).__name__ for module in model.modules()}
        assert set(model._no_split_modules) <= held
    assert torch.distributed.is_available()
