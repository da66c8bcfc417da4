"""Experts that share a network, against the naive twin: every expert's weights multiplied out."""

from types import SimpleNamespace

import pytest
import torch

from hf_moe.modeling.moe_layers import MoeBlock
from hf_moe.modeling.moe_low_rank import LowRankExperts
from tests.conftest import FAMILIES, batch, labels_for, lm_class, tiny_moe
from tests.modeling.test_layers import SHAPES, config, fill, naive_experts, outputs_and_gradients


def multiplied_out(experts):
    """What `naive_experts` reads, with W + B A of every expert."""
    values = {"has_gate": experts.has_gate, "act_fn": experts.act_fn, "has_bias": experts.down_proj_bias is not None}
    for name in (experts.up_name, "down_proj"):
        values[name] = getattr(experts, name) + getattr(experts, f"{name}_b") @ getattr(experts, f"{name}_a")
        bias = getattr(experts, f"{name}_bias")
        values[f"{name}_bias"] = None if bias is None else bias.expand(experts.num_experts, -1)
    return SimpleNamespace(**values)


@pytest.mark.parametrize(("gated", "bias"), SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12), (torch.bfloat16, 6e-2)]
)
def test_outputs_and_all_gradients_are_those_of_whole_experts(gated, bias, dtype, tolerance):
    experts = fill(LowRankExperts(config(expert_rank=3), hidden_act="gelu", gated=gated, bias=bias), dtype)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(13, 16, generator=generator).to(dtype)
    index = torch.rand(13, 3, generator=generator).argsort(1)  # expert 3 stays without tokens
    weights = torch.rand(13, 3, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    expected = outputs_and_gradients(lambda *a: naive_experts(multiplied_out(experts), *a), experts, x, index, weights)
    got = outputs_and_gradients(experts, experts, x, index, weights)
    assert all(e.abs().max() > 0 for e in expected)
    for e, g in zip(expected, got, strict=True):
        assert e.dtype == g.dtype
        torch.testing.assert_close(g, e, rtol=tolerance, atol=tolerance * float(e.abs().max()))


def test_empty_slots_count_nothing():
    experts = fill(LowRankExperts(config(expert_rank=3), hidden_act="gelu"), torch.float64)
    x, weights = torch.randn(5, 16, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    both, first = torch.tensor([[0, 4]] * 5), torch.tensor([[0]] * 5)
    torch.testing.assert_close(experts(x, both, weights), experts(x, first, weights[:, :1]))
    assert not experts(x, torch.full((5, 2), 4), weights).any()


def test_autocast_computes_in_its_dtype():
    experts = fill(LowRankExperts(config(expert_rank=3), hidden_act="gelu", gated=True))
    x, index, weights = torch.randn(13, 16), torch.tensor([[0, 2]] * 13), torch.rand(13, 2)
    with torch.autocast("cpu", torch.bfloat16):
        got = experts(x, index, weights)
    expected = experts(x, index, weights)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=6e-2, atol=6e-2 * expected.abs().max().item())


def test_a_new_one_starts_as_copies():
    """B is 0 at the start, so that no expert differs; A is not, so that B gets a gradient."""
    model = tiny_moe("llama", expert_rank=3)
    fresh = type(model)(model.config)
    experts = [module for module in fresh.modules() if isinstance(module, LowRankExperts)]
    assert len(experts) == 2
    for module in experts:
        for name, parameter in module.named_parameters():
            assert bool(parameter.any()) != name.endswith("_b"), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_with_them_and_saves_them(family, tmp_path):
    model = tiny_moe(family, expert_rank=3).train()
    inputs = batch(family)
    outputs = model(**inputs, **labels_for(lm_class(family), family, inputs))
    assert outputs.loss is not None
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert parameter.grad is not None, name
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.expert_rank == 3
    for name, parameter in again.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name]), name


def test_what_it_costs():
    """The stored experts are one network and the factors."""
    whole = MoeBlock(config(), hidden_act="gelu").experts
    low = MoeBlock(config(expert_rank=1), hidden_act="gelu").experts
    E, R, D, F = 4, 1, 16, 24
    assert sum(p.numel() for p in whole.parameters()) == E * (2 * D * F + D + F)
    assert sum(p.numel() for p in low.parameters()) == 2 * D * F + D + F + 2 * E * R * (D + F)
