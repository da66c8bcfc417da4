"""Parallel plans: what a configuration promises of a body, the models have."""

import re

import pytest

from hf_moe.convert import FAMILIES as TABLES
from hf_moe.modeling import CONFIGS
from hf_moe.modeling.moe_experts import MoeExperts
from tests.conftest import FAMILIES, moe_classes, tiny_moe

BODILESS = ("Encoder", "Decoder")  # inside a body, not loaded by themselves


def named(model):
    return {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}


def wildcard(name):
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_configuration_knows_where_its_mixtures_are(family):
    table = TABLES[family]
    assert CONFIGS[family].moe_block == f"{table.layer.format(layer='*')}.{table.block}"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("moe_layers", [[0, 2], None], ids=["some layers", "all layers"])
def test_expert_parallelism_shares_out_every_tensor_of_the_experts(family, moe_layers):
    for name in moe_classes(family):
        model = tiny_moe(family, name, moe_layers=moe_layers)
        experts = {n: module for n, module in model.named_modules() if isinstance(module, MoeExperts)}
        expected = {wildcard(n): "ep_dispatch_experts" for n in experts}
        for n, module in experts.items():
            expected |= {wildcard(f"{n}.{tensor}"): "grouped_gemm" for tensor, _ in module.named_parameters()}
        assert model.ep_plan == expected, name


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rule_is_for_something_that_is_not_there(family):
    for name in moe_classes(family):
        model = tiny_moe(family, name)
        held = {wildcard(n) for n in named(model)}
        for plan in (model.tp_plan, model.ep_plan, model.fsdp_plan):
            assert set(plan) <= held, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_gathered_by_itself(family):
    model = tiny_moe(family)
    layers = {name.rpartition(".mlp")[0] for name in named(model)} and {
        wildcard(name) for name in named(model) if re.search(r"\.(layers?|h)\.\d+$", f".{name}")
    }
    assert layers
    assert layers <= {rule for rule, style in model.fsdp_plan.items() if style == "free_full_weight"}


@pytest.mark.parametrize("family", FAMILIES)
def test_neurons_are_dealt_out_only_where_experts_have_no_biases(family):
    model = tiny_moe(family)
    cut = [rule for rule, style in model.tp_plan.items() if ".experts" in rule]
    biased = any(name.endswith("_proj_bias") for name, _ in model.named_parameters())
    dense_has_a_plan = CONFIGS[family].__bases__[1].base_model_tp_plan is not None
    assert bool(model.tp_plan) == dense_has_a_plan
    assert bool(cut) == (dense_has_a_plan and not biased)
    if family == "llama":
        assert not [rule for rule in tiny_moe("llama", mlp_bias=True).tp_plan if ".experts" in rule]


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_of_the_code_and_not_saved(family, tmp_path):
    config = CONFIGS[family]()
    config.save_pretrained(tmp_path)
    assert "_plan" not in (tmp_path / "config.json").read_text()
