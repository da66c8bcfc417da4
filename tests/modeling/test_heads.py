"""Every head against its dense class: what it is built of, what it computes, what it returns."""

import inspect
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import Dinov2Model

from hf_moe.convert import FAMILIES as TABLES
from hf_moe.convert.classes import body_classes
from hf_moe.modeling import CONFIGS
from hf_moe.modeling.modeling_moe import rebind
from hf_moe.modeling.moe_layers import MoeBlock
from hf_moe.modeling.moe_losses import load_balancing_loss
from tests.conftest import (
    FAMILIES,
    assert_equal,
    batch,
    block_name,
    dense_classes,
    inputs_for,
    labels_for,
    moe_classes,
    tiny_moe,
)
from tests.families import TESTED

HEADS = [(family, name) for family in FAMILIES for name in moe_classes(family)]
IDS = [name for _, name in HEADS]
WITH_LOSS = [(family, name) for family, name in HEADS if labels_for(name, family, batch(family))]
MASKED = [family for family in FAMILIES if "attention_mask" in batch(family)]


def in_mixture(family, name):
    return f".{block_name(family)}.gate." in name or f".{block_name(family)}.experts." in name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_that_transformers_has_is_here(family):
    config_class = CONFIGS[family]
    dense_config = config_class.__bases__[1]
    module = inspect.getmodule(dense_classes(family)[next(iter(dense_classes(family)))])
    left_out, table = set(TESTED[family].left_out), TABLES[family]
    exported = {name for name in module.__all__ if not name.endswith("PreTrainedModel")}
    exported = {name for name in exported if getattr(getattr(module, name), "config_class", None) is dense_config}
    listed = {
        auto: mapping._model_mapping[family]
        for auto in dir(transformers)
        if auto.startswith(("AutoModel", "AutoBackbone"))
        if (mapping := getattr(transformers, auto)._model_mapping) is not None
        if family in mapping._model_mapping
    }

    def taken(name):
        return body_classes(table)[0].__name__ if name in table.encoder_of else name

    assert left_out <= exported | set(listed.values())
    assert set(dense_classes(family)) == set(map(taken, exported - left_out))
    ours = {auto: moe_classes(family)[name].__bases__[1].__name__ for auto, name in config_class.auto_classes.items()}
    assert ours == {auto: taken(name) for auto, name in listed.items() if name not in left_out}


@pytest.mark.parametrize(("family", "name"), HEADS, ids=IDS)
def test_built_as_the_dense_class_is(family, name):
    moe = tiny_moe(family, name)
    dense = type(moe).__bases__[1](TESTED[family].tiny())
    moe_children, dense_children = ({n: type(m) for n, m in model.named_children()} for model in (moe, dense))
    assert list(moe_children) == list(dense_children)
    for child, kind in dense_children.items():
        assert issubclass(moe_children[child], kind)
    assert set(vars(dense)) == set(vars(moe))
    blocks = [n for n, m in moe.base_model.named_modules() if isinstance(m, MoeBlock)]
    assert len(blocks) == 2  # layers 0 and 2 of 3
    outside = {n for n in moe.state_dict() if not in_mixture(family, n)}
    assert outside < set(dense.state_dict())
    assert isinstance(moe.base_model.get_submodule(blocks[0]), nn.Module)


@pytest.mark.parametrize(("family", "name"), HEADS, ids=IDS)
def test_signature_is_the_dense_one(family, name):
    cls = moe_classes(family)[name]
    assert inspect.signature(cls.forward) == inspect.signature(cls.__bases__[1].forward)
    assert inspect.signature(cls.__init__) == inspect.signature(cls.__bases__[1].__init__)


@pytest.mark.parametrize(("family", "name"), HEADS, ids=IDS)
def test_outputs(family, name):
    model, inputs = tiny_moe(family, name), inputs_for(name, family)
    body = model is model.base_model
    plain = model(**inputs)
    assert "router_logits" not in plain
    assert "aux_loss" not in plain
    full = model(**inputs, output_router_logits=True)
    with_states = model(**inputs, output_hidden_states=True)
    assert len(with_states.hidden_states) == 4
    tokens = with_states.hidden_states[0].shape[:-1].numel()
    assert [tuple(logits.shape) for logits in full.router_logits] == [(tokens, 4), (tokens, 4)]
    assert_equal(plain[0], full[0])
    if not body:
        assert full.aux_loss > 0
        assert full.z_loss > 0
    as_tuple = model(**inputs, output_router_logits=True, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(full.to_tuple())
    again = pickle.loads(pickle.dumps(full))
    assert type(again) is type(full)
    assert torch.equal(again.router_logits[1], full.router_logits[1])


@pytest.mark.parametrize(("family", "name"), WITH_LOSS)
def test_auxiliary_losses_join_the_loss_in_training_only(family, name):
    inputs = inputs_for(name, family)
    labels = labels_for(name, family, inputs)
    model = tiny_moe(family, name, router_aux_loss_coef=0.5, router_z_loss_coef=0.25)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    evaluated = model(**inputs, **labels, output_router_logits=True)
    torch.manual_seed(0)
    trained = model.train()(**inputs, **labels)
    model.config.router_aux_loss_coef = model.config.router_z_loss_coef = 0.0
    torch.manual_seed(0)
    task = model(**inputs, **labels).loss
    torch.testing.assert_close(trained.loss, task + 0.5 * trained.aux_loss + 0.25 * trained.z_loss)
    torch.testing.assert_close(trained.aux_loss, evaluated.aux_loss)
    if name not in TESTED[family].cannot:
        torch.testing.assert_close(task, evaluated.loss)
    trained.loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if in_mixture(family, n))


@pytest.mark.parametrize(("family", "name"), [head for head in WITH_LOSS if head[0] in MASKED])
def test_padding_does_not_move_the_auxiliary_losses(family, name):
    inputs = inputs_for(name, family)
    model = tiny_moe(family, name)
    before = model(**inputs, output_router_logits=True)
    kind, mask = TABLES[family].inputs, inputs["attention_mask"]
    changed = {**inputs, kind: torch.where(mask == 0, 7, inputs[kind])}
    after = model(**changed, output_router_logits=True)
    torch.testing.assert_close(before.aux_loss, after.aux_loss)
    torch.testing.assert_close(before.z_loss, after.z_loss)


@pytest.mark.parametrize("family", MASKED)
def test_positional_mask_counts_as_a_mask(family):
    model, inputs = tiny_moe(family), batch(family)
    by_name = model(**inputs, output_router_logits=True)
    names = list(inspect.signature(model.forward).parameters)
    positional = [inputs.get(name) for name in names[: names.index("attention_mask") + 1]]
    by_position = model(*positional, output_router_logits=True)
    assert torch.equal(by_name.aux_loss, by_position.aux_loss)


def test_rebind_refuses_a_constructor_that_builds_something_else():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = nn.ReLU()

    with pytest.raises(ImportError, match="does not build BertModel"):
        rebind(Dense.__init__, BertModel=nn.Linear)


def test_rebind_leaves_the_dense_classes_alone():
    tiny_moe("bert")
    dense = dense_classes("bert")["BertForMaskedLM"](TESTED["bert"].tiny())
    assert not any(isinstance(module, MoeBlock) for module in dense.modules())


def test_gated_experts_of_dinov2_are_its_gated_network():
    """This form can't be converted from disk, so its experts are filled here."""
    dense = Dinov2Model(TESTED["dinov2"].tiny(use_swiglu_ffn=True)).eval()
    moe = tiny_moe("dinov2", "Dinov2MoeModel", use_swiglu_ffn=True, moe_intermediate_size=None)
    moe.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for layer in (0, 2):
            mlp, experts = dense.encoder.layer[layer].mlp, moe.encoder.layer[layer].mlp.experts
            for kind, suffix in (("weight", ""), ("bias", "_bias")):
                up = torch.cat([getattr(mlp.gate_proj, kind), getattr(mlp.up_proj, kind)])
                getattr(experts, f"gate_up_proj{suffix}").copy_(up.expand(4, *up.shape))
                down = getattr(mlp.down_proj, kind)
                getattr(experts, f"down_proj{suffix}").copy_(down.expand(4, *down.shape))
    inputs = batch("dinov2")
    torch.testing.assert_close(moe(**inputs).last_hidden_state, dense(**inputs).last_hidden_state)


def test_a_mask_above_the_layers_counts():
    model, inputs = tiny_moe("dinov2"), batch("dinov2")
    mask = torch.ones(2, 5, dtype=torch.long)
    everything = model(**inputs, attention_mask=mask, output_router_logits=True)
    mask[1, 3:] = 0
    masked = model(**inputs, attention_mask=mask, output_router_logits=True)
    expected = load_balancing_loss(masked.router_logits, 2, mask.reshape(-1))
    torch.testing.assert_close(masked.aux_loss, expected)
    assert not torch.allclose(masked.aux_loss, everything.aux_loss)
