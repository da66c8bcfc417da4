"""What trains, by preset and by pattern."""

import logging

import pytest
import torch

import hf_moe
from hf_moe.errors import UsageError
from hf_moe.training import freeze, what_trains
from hf_moe.training.freezing import PRESETS, kind_of, warn_of_router_rate
from hf_moe.training.peft import add_adapter
from tests.conftest import TEXT_FAMILIES, tiny_moe
from tests.families import TESTED


def names(model, *, trains=True):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad == trains}


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_presets_divide_every_family(family):
    model = tiny_moe(family, shared_expert_intermediate_size=8)
    everything = names(model)
    freeze(model, "experts_only")
    experts = names(model)
    freeze(model, "router_only")
    routers = names(model)
    freeze(model, "all_but_router")
    assert names(model) == everything - routers
    freeze(model, "none")
    assert names(model) == everything
    modules = {name for name, module in model.named_modules() if type(module).__name__ == "TopKRouter"}
    assert routers == {f"{name}.weight" for name in modules}
    blocks = {f"{name.rpartition('.')[0]}." for name in modules}
    assert experts == {name for name in everything if name.startswith(tuple(blocks))} - routers


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "distilbert"])
def test_backbone_leaves_the_head(family):
    model = tiny_moe(family, next(n for n in dir(hf_moe) if n.endswith("SequenceClassification") and _of(family, n)))
    freeze(model, "backbone")
    assert names(model)
    assert not any(name.startswith(f"{model.base_model_prefix}.") for name in names(model))


def _of(family, name):
    from hf_moe.modeling import CONFIGS

    return name.startswith(CONFIGS[family].__name__.removesuffix("Config"))


def test_new_weights_train_whatever_a_preset_says():
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    freeze(model, "experts_only", new=["classifier.weight", "classifier.bias"])
    assert {"classifier.weight", "classifier.bias"} <= names(model)
    assert {kind_of(name) for name in names(model)} == {"experts", "other"}


def test_patterns_freeze_what_they_are_found_in(caplog):
    model = tiny_moe("bert")
    freeze(model, [r"embeddings", r"layer\.0\."])
    frozen = names(model, trains=False)
    assert frozen == {name for name, _ in model.named_parameters() if "embeddings" in name or "layer.0." in name}
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        freeze(model, [r"mlp"])
    assert "All experts stay frozen" in caplog.text


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("none", False),
        ("router_only", False),
        ("gradual:2", False),  # they train in time
        ("experts_only", True),
        ("backbone", True),
        ([r"gate"], True),
    ],
)
def test_a_rate_for_routers_that_stay_frozen_is_told_of(how, told, caplog):
    model = tiny_moe("bert", "BertMoeForSequenceClassification")
    callbacks = freeze(model, how)
    warn_of_router_rate(model, None, callbacks)
    assert not caplog.records
    warn_of_router_rate(model, 1e-3, callbacks)
    assert [record.message for record in caplog.records] == [
        "router_learning_rate changes nothing: by `freeze` or `peft` all routers stay frozen."
    ] * told


def test_a_rate_for_routers_goes_with_adapters_of_routers(caplog, dense_folder):
    from transformers import BertForMaskedLM

    warn_of_router_rate(add_adapter(tiny_moe("bert"), "experts+router"), 1e-3, [])
    warn_of_router_rate(BertForMaskedLM.from_pretrained(dense_folder("bert")), 1e-3, [])  # the control has none
    assert not caplog.records
    warn_of_router_rate(add_adapter(tiny_moe("bert"), "experts"), 1e-3, [])
    assert "all routers stay frozen" in caplog.text


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("expert_only", "choose from none, backbone, experts_only"),
        ("gradual:0", "'gradual:N' with a number of steps"),
        (["no such name"], "'no such name' matches no parameter; the first is 'bert.embeddings"),
        (["("], "is no regular expression"),
        ([""], "leaves nothing of BertMoeForMaskedLM to train"),
    ],
)
def test_what_can_not_be_frozen(how, words):
    with pytest.raises(UsageError) as raised:
        freeze(tiny_moe("bert"), how)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("how", ["experts_only", "router_only", "all_but_router"])
def test_a_dense_model_has_no_experts(how, dense_folder):
    from transformers import BertForMaskedLM

    with pytest.raises(UsageError, match="is dense"):
        freeze(BertForMaskedLM.from_pretrained(dense_folder("bert")), how)


class State:
    global_step = 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_gradual_unfreezes_from_the_top(family):
    model = tiny_moe(family)
    [callback] = freeze(model, "gradual:2")
    state, seen = State(), []
    callback.on_train_begin(None, state, None)
    for state.global_step in range(1, 9):
        seen.append(names(model))
        callback.on_step_end(None, state, None)
    layers = [{int(p) for name in step for p in name.split(".") if p.isdigit()} for step in seen]
    assert layers == [{2}, {2}, {1, 2}, {1, 2}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2}]
    embeddings = [any("embed" in name or "wte" in name for name in step if "lm_head" not in name) for step in seen]
    assert embeddings == [False] * 6 + [True] * 2
    assert names(model, trains=False) == set()
    again = tiny_moe(family)
    [callback] = freeze(again, "gradual:2")
    state.global_step = 3  # resumed there
    callback.on_train_begin(None, state, None)
    assert names(again) == seen[3]


def test_what_trains_adds_up():
    model = tiny_moe("gpt2")
    freeze(model, "experts_only")
    told = what_trains(model)
    assert told["parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert told["tensors"] == len(names(model))
    assert (
        told["of"] == sum(row["of"] for row in told["by_kind"].values()) == sum(p.numel() for p in model.parameters())
    )
    assert told["by_kind"]["router"] == {"parameters": 0, "of": 2 * 4 * 32}
    assert told["share"] == pytest.approx(told["parameters"] / told["of"])


def test_what_zero_3_holds_elsewhere_is_counted():
    model = tiny_moe("gpt2")
    whole = what_trains(model)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert what_trains(model) == whole


def test_frozen_parameters_do_not_move():
    model = tiny_moe("bert").train()
    freeze(model, "router_only")
    assert TESTED["bert"].tiny().hidden_size == 32
    ids = torch.randint(5, 60, (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == names(model)
    assert set(PRESETS) >= {"none", "backbone"}
