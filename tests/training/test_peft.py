"""PEFT presets: what they reach, and adapters that train, save, load, merge and leave."""

import logging
import re

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_moe.errors import UsageError
from hf_moe.routing.hooks import experts_of
from hf_moe.training.peft import adapter_options, add_adapter, frozen_experts, peft_config
from tests.conftest import FAMILIES, batch, labels_for, lm_class, scatter, tiny_moe

PRESETS = ("attention", "experts", "router", "attention+experts", "attention+experts+router")
FORMS = ("bert", "gpt2", "llama")
SIZES = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}
NATIVE = {
    "mixtral": (MixtralForCausalLM, MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen2_moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    ),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig(**SIZES, num_experts=4, moe_intermediate_size=24, head_dim=8)),
}


def make(name):
    if name not in NATIVE:
        return tiny_moe(name)
    model_class, config = NATIVE[name]
    torch.manual_seed(0)
    return scatter(model_class(config))


def inputs(name):
    family = "llama" if name in NATIVE else name
    held = batch(family)
    return {**held, **labels_for(lm_class(family), family, held)}


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**inputs(name)).logits


def train(adapted, name, steps=2, rate=0.1):
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        adapted.train()(**inputs(name)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted


@pytest.mark.parametrize("name", [*FORMS, *NATIVE])
@pytest.mark.parametrize("preset", PRESETS)
def test_an_adapter_trains_saves_loads_merges_and_leaves(name, preset, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    before = logits(model, name)
    adapted = add_adapter(model, preset, r=2)
    torch.testing.assert_close(logits(adapted, name), before, rtol=1e-5, atol=1e-5)  # a start that changes nothing
    after = logits(train(adapted, name), name)
    assert float((after - before).abs().max()) > 1e-3

    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), after)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, name), before, rtol=1e-5, atol=1e-5)

    loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = type(model).from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, name), after, rtol=1e-4, atol=1e-5)
    files = {file.name for file in (tmp_path / "base").iterdir()}
    assert files == {file.name for file in (tmp_path / "merged").iterdir()}
    assert merged.state_dict().keys() == model_state(tmp_path / "base", type(model))

    adapted = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(adapted.unload(), name), before, rtol=1e-5, atol=1e-5)


def model_state(folder, model_class):
    return model_class.from_pretrained(folder).state_dict().keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_attention_of_every_family_is_found(family):
    """Every projection of every layer, and nothing else."""
    model = tiny_moe(family, moe_layers=[0, 2])
    adapted = add_adapter(model, "attention", r=2)
    trained = {
        name.split(".lora_")[0] for name, p in adapted.named_parameters() if p.requires_grad and "lora_" in name
    }
    layers = {part for name in trained for part in name.split(".") if part.isdigit()}
    assert layers >= {"0", "1", "2"}
    assert all("att" in name for name in trained)
    each = len(trained) / 3
    assert each == int(each)
    assert each >= 2
    assert not [name for name in trained if "mlp" in name or "experts" in name]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_weights_of_all_experts_are_found(family):
    model = tiny_moe(family, shared_expert_intermediate_size=16)
    adapted = add_adapter(model, "experts", r=2, train_head=False)
    wrapped = {module.parameter_name for module in adapted.modules() if hasattr(module, "parameter_name")}
    assert wrapped in ({"up_proj", "down_proj"}, {"gate_up_proj", "down_proj"})
    shared = {name for name, _ in adapted.named_modules() if ".shared_expert." in name and name.endswith("lora_A")}
    assert len(shared) == 2 * (3 if "gate_up_proj" in wrapped else 2)


def test_each_expert_has_a_lora_of_its_own():
    """PEFT's matrices of a stacked parameter are a pair for each expert: moving one moves that expert alone, by a
    matrix of rank r."""
    adapted = add_adapter(tiny_moe("llama"), "experts", r=2)
    wrapper = next(m for m in adapted.modules() if getattr(m, "parameter_name", None) == "gate_up_proj")
    E, R = 4, 2
    a, b = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
    assert a.shape == (E * R, 32)
    assert b.shape == (128, E * R)
    with torch.no_grad():
        b.normal_()
        whole = wrapper.get_delta_weight("default")
        assert all(int(torch.linalg.matrix_rank(of_expert)) == R for of_expert in whole)
        a.view(E, R, -1)[1] = 0
        without = wrapper.get_delta_weight("default")
    assert [torch.equal(one, other) for one, other in zip(whole, without, strict=True)] == [True, False, True, True]


@pytest.mark.parametrize("name", [*FORMS, "mixtral"])
def test_gradients_of_experts_do_not_depend_on_how_they_run(name):
    found = {}
    for implementation in ("eager", "sorted_mm", "grouped_mm"):
        torch.manual_seed(0)
        model = make(name)
        model.set_experts_implementation(implementation)
        adapted = add_adapter(model, "attention+experts", r=2)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        for module in adapted.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        adapted.train()(**inputs(name)).loss.backward()
        found[implementation] = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    reference = found.pop("eager")
    assert all(grad is not None and grad.any() for grad in reference.values())
    for implementation, grads in found.items():
        for parameter, grad in reference.items():
            torch.testing.assert_close(
                grads[parameter], grad, rtol=1e-3, atol=1e-5, msg=f"{implementation} {parameter}"
            )


def test_a_merged_mixture_is_an_ordinary_checkpoint(tmp_path):
    adapted = train(add_adapter(tiny_moe("gpt2"), "attention+experts+router", r=2), "gpt2")
    expected = logits(adapted, "gpt2")
    adapted.merge_and_unload().save_pretrained(tmp_path)
    assert (tmp_path / "modeling_gpt2_moe.py").exists()
    assert "auto_map" in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "GPT2MoeLMHeadModel"
    torch.testing.assert_close(logits(loaded, "gpt2"), expected, rtol=1e-4, atol=1e-5)


def test_a_new_head_is_trained_and_saved(tmp_path):
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    adapted = add_adapter(model, "attention", r=2)
    assert [n for n, p in adapted.named_parameters() if p.requires_grad and "classifier.modules_to_save" in n]
    adapted = add_adapter(tiny_moe("bert", "BertMoeForSequenceClassification"), "attention", r=2, train_head=False)
    assert not [n for n, p in adapted.named_parameters() if p.requires_grad and "classifier" in n]


def test_experts_that_stay_frozen_are_told_of(caplog):
    caplog.set_level(logging.WARNING)
    add_adapter(tiny_moe("bert"), LoraConfig(target_modules="all-linear"))
    [record] = [record for record in caplog.records if "stay frozen" in record.message]
    assert "\n" not in record.message
    caplog.clear()
    for preset in ("experts", "attention+experts"):
        add_adapter(tiny_moe("bert"), preset)
    assert not [record for record in caplog.records if "stay frozen" in record.message]
    dense = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, intermediate_size=64))
    assert frozen_experts(dense) is None
    assert frozen_experts(tiny_moe("bert").requires_grad_(False)) is None
    assert frozen_experts(tiny_moe("bert")) is None
    router_only = tiny_moe("bert").requires_grad_(False)
    for name in experts_of(router_only).values():
        router_only.get_submodule(name.replace("experts", "gate")).requires_grad_(True)
    assert "none of the" in frozen_experts(router_only)


@pytest.mark.parametrize(
    ("family", "values", "preset", "options", "why"),
    [
        ("bert", {}, "everything", {}, "join any of attention, experts, router by '+'"),
        ("bert", {}, "attention+router", {"lora_dropout": 0.1}, "no lora_dropout for experts and routers"),
        ("bert", {"expert_rank": 2}, "experts", {}, "low rank already"),
        ("bert", {}, "attention", {"rank": 4}, "peft: unknown key 'rank'; did you mean 'r'?"),
        ("bert", {}, "attention", {"use_rslore": True}, "did you mean 'use_rslora'?"),
        ("bert", {}, "attention", {"colour": 1}, "choose from preset, r, lora_alpha, lora_dropout, train_head"),
        ("bert", {}, "attention", {"r": 0}, "peft: r is 0; it must be at least 1."),
        ("bert", {}, "attention", {"r": "x"}, "peft: r is 'x', which is no int."),
        ("bert", {}, "attention", {"lora_alpha": -1}, "lora_alpha is -1; it must be above 0."),
        ("bert", {}, "attention", {"lora_dropout": 1.5}, "lora_dropout is 1.5; it must be at least 0 and below 1."),
        ("bert", {}, "attention", {"target_modules": ["nope"]}, "Target modules {'nope'} not found"),
        ("bert", {}, "attention", {"layers_to_transform": [0], "target_modules": "x"}, "cannot be used when"),
        ("bert", {}, 3, {}, "peft: preset is 3, which is no str."),
        ("bert", {}, None, {}, "peft: preset is None, which is no str."),
    ],
)
def test_what_can_not_be_is_refused_in_a_line(family, values, preset, options, why):
    with pytest.raises(UsageError, match=re.escape(why)) as caught:
        add_adapter(tiny_moe(family, **values), preset, **options)
    assert "\n" not in str(caught.value)


def test_a_recipes_adapter_is_read_as_a_person_writes_it():
    assert adapter_options("experts") == {"preset": "experts"}
    assert adapter_options({"r": 4, "lora_alpha": "1e1"}) == {
        "preset": "attention+experts",
        "r": 4,
        "lora_alpha": 10.0,
    }
    config = peft_config(tiny_moe("bert"), "attention", r=4, init_lora_weights="pissa_niter_4", use_rslora=True)
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (4, 8, "pissa_niter_4")


def test_a_dense_model_has_no_experts_to_adapt():
    dense = BertForMaskedLM(BertConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, intermediate_size=64))
    with pytest.raises(UsageError, match="has no experts"):
        peft_config(dense, "experts")
    assert peft_config(dense, "attention").target_modules
