"""What users do with a Transformers model keeps working: generation, checkpointing, compile, PEFT, pipelines."""

import contextlib
import copy
import logging

import numpy
import pytest
import torch
import transformers
from accelerate import infer_auto_device_map
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoTokenizer, StaticCache, pipeline

import hf_moe
from hf_moe.modeling.moe_losses import load_balancing_loss
from hf_moe.modeling.moe_routers import TopKRouter
from tests.conftest import (
    FAMILIES,
    TEXT_FAMILIES,
    batch,
    block_name,
    labels_for,
    lm_class,
    real_tokens,
    save_processors,
    tiny_moe,
)
from tests.families import DECODERS, TESTED

every_family = pytest.mark.parametrize("family", FAMILIES)
every_text_family = pytest.mark.parametrize("family", TEXT_FAMILIES)
every_decoder = pytest.mark.parametrize("family", DECODERS)


def lm_inputs(family, **kwargs):
    inputs = batch(family, **kwargs)
    return {**inputs, **labels_for(lm_class(family), family, inputs)}


def in_dtype(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def real_logits(family, model, inputs):
    """One row a token, without those of padding, or one row an input."""
    logits = model(**inputs).logits
    return logits[real_tokens(family, inputs)] if logits.ndim == 3 else logits


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, tolerance=1e-5):
    torch.testing.assert_close(one[0], other[0], rtol=tolerance, atol=tolerance)
    assert one[1].keys() == other[1].keys()
    for name in one[1]:
        torch.testing.assert_close(one[1][name], other[1][name], rtol=tolerance, atol=tolerance, msg=name)


def as_the_dense_class(family, feature):
    """Expects the refusal, where the dense class refuses too."""
    words = TESTED[family].refused.get(feature)
    return pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()


@every_family
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm", "sorted_mm"])
def test_experts_implementations_agree_in_the_whole_model(family, implementation):
    model = without_dropout(tiny_moe(family)).train()
    assert model.config._experts_implementation == "sorted_mm"  # the default, and not silently the loop
    model.set_experts_implementation("eager")
    expected = gradients(model, lm_inputs(family))
    model.set_experts_implementation(implementation)
    assert model.base_model.config._experts_implementation == implementation
    assert_same(gradients(model, lm_inputs(family)), expected, tolerance=1e-4)


@every_family
def test_dropout_is_where_the_dense_model_has_it(family, dense_folder):
    """With every token at one expert, both draw the same random numbers in the same order."""
    class_name = lm_class(family)
    model = getattr(hf_moe, class_name).from_dense(dense_folder(family), num_experts=2, num_experts_per_tok=1)
    dense = type(model).__bases__[1].from_pretrained(dense_folder(family))
    model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.register_forward_hook(lambda _, args, out: (out[0], torch.ones_like(out[1]), out[2] * 0))
    logits = []
    for one in (model, dense):
        torch.manual_seed(0)
        logits.append(one.train()(**batch(family)).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)


@every_family
def test_experts_implementation_survives_a_dense_model_built_before(family):
    model = tiny_moe(family)
    type(model).__bases__[1](TESTED[family].tiny())
    assert tiny_moe(family).config._experts_implementation == "sorted_mm"


@every_family
def test_gradient_checkpointing_changes_no_gradient(family):
    model = without_dropout(tiny_moe(family, router_aux_loss_coef=0.5, router_z_loss_coef=0.1)).train()
    expected = gradients(model, lm_inputs(family))
    dense = type(model).__bases__[1](TESTED[family].tiny())
    for one in (dense, model):
        with as_the_dense_class(family, "gradient checkpointing"):
            one.gradient_checkpointing_enable()
    assert_same(gradients(model, lm_inputs(family)), expected)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_dropped_layers_route_nothing(share):
    model = tiny_moe("wav2vec2", layerdrop=share, apply_spec_augment=True, mask_time_length=2).train()
    torch.manual_seed(1)
    outputs = model(**lm_inputs("wav2vec2"), output_router_logits=True)
    assert len(outputs.router_logits) < 2
    assert (outputs.aux_loss > 0) == (len(outputs.router_logits) > 0)
    outputs.loss.backward()


def test_reentrant_checkpointing_is_warned_of(caplog, monkeypatch):
    model = tiny_moe("bert").train()
    monkeypatch.setattr(logging.getLogger("hf_moe"), "propagate", True)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert "get no gradient" in caplog.text


def test_an_additive_mask_is_not_taken_for_a_mask_of_tokens():
    model, inputs = tiny_moe("bert", attn_implementation="eager"), batch("bert")
    additive = (1 - inputs["attention_mask"][:, None, None].float()) * torch.finfo(torch.float32).min
    by_bias = model(inputs["input_ids"], attention_mask=additive, output_router_logits=True)
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(by_bias.logits[kept], model(**inputs).logits[kept], rtol=1e-4, atol=1e-5)
    everything = load_balancing_loss(by_bias.router_logits, 2)
    assert torch.equal(by_bias.aux_loss, everything)


@pytest.mark.parametrize(
    ("family", "attention"),
    [(family, attention) for family, row in TESTED.items() for attention in row.attention_implementations],
)
def test_attention_implementations(family, attention, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    inputs = batch(family)
    with as_the_dense_class(family, attention):
        type(model).__bases__[1](TESTED[family].tiny(attn_implementation=attention))
    with as_the_dense_class(family, attention):
        again = type(model).from_pretrained(tmp_path, attn_implementation=attention)
        assert again.config._attn_implementation == attention
        expected = real_logits(family, model, inputs)
        torch.testing.assert_close(real_logits(family, again, inputs), expected, rtol=1e-4, atol=1e-5)


def test_attentions_and_router_logits_together():
    model = tiny_moe("bert", attn_implementation="eager")
    outputs = model(**batch("bert"), output_attentions=True, output_router_logits=True)
    assert len(outputs.attentions) == 3
    assert len(outputs.router_logits) == 2


@every_decoder
def test_cache_gives_the_same_text(family):
    model = tiny_moe(family)
    inputs = batch(family, padding=False)
    texts = [model.generate(**inputs, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False)]
    assert torch.equal(*texts)


@every_decoder
def test_generation_returns_to_plain_outputs_with_router_logits_switched_on(family):
    model = tiny_moe(family, output_router_logits=True)
    inputs = batch(family)
    inputs = {name: value.flip(1) for name, value in inputs.items()}  # padding on the left, as for generation
    generated = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert generated.shape == (2, 15)


@every_decoder
def test_a_cached_mask_is_longer_than_the_tokens(family):
    model = tiny_moe(family)
    inputs = batch(family, padding=False)
    whole = model(**inputs, output_router_logits=True)
    first = model(input_ids=inputs["input_ids"][:, :6], use_cache=True)
    rest = model(
        input_ids=inputs["input_ids"][:, 6:],
        attention_mask=inputs["attention_mask"],
        past_key_values=first.past_key_values,
        output_router_logits=True,
    )
    assert rest.router_logits[0].shape == (8, 4)
    expected = whole.router_logits[0].view(2, 10, 4)[:, 6:].reshape(8, 4)
    torch.testing.assert_close(rest.router_logits[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [family for family in DECODERS if not TESTED[family].no_static_cache])
def test_static_cache(family):
    model = tiny_moe(family)
    inputs = batch(family, padding=False)
    cache = StaticCache(config=model.config, max_cache_len=32)
    static = model.generate(**inputs, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert torch.equal(static, model.generate(**inputs, max_new_tokens=6, do_sample=False))


@every_family
def test_bfloat16(family, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    inputs = in_dtype(lm_inputs(family), torch.bfloat16)
    outputs = half(**inputs, output_router_logits=True)
    assert outputs.logits.dtype == torch.bfloat16
    assert outputs.router_logits[0].dtype == torch.float32
    half.train()(**inputs).loss.backward()
    assert half.base_model.get_parameter(expert_name(half)).grad.dtype == torch.bfloat16


def assert_same_model(family, one, other):
    """Weights to the bit; outputs within rounding, which depends on where in memory a weight lies."""
    weights, others = one.state_dict(), other.state_dict()
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    inputs = batch(family)
    torch.testing.assert_close(one.eval()(**inputs).logits, other.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)


def expert_name(model):
    names = [name for name, _ in model.base_model.named_parameters()]
    return next(name for name in names if ".experts." in name and name.endswith("up_proj"))


@every_family
def test_float64_runs_whatever_the_implementation(family):
    model = tiny_moe(family).double()
    assert model(**in_dtype(batch(family), torch.float64)).logits.dtype == torch.float64


@every_family
def test_autocast(family):
    model = without_dropout(tiny_moe(family)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**lm_inputs(family)).loss
    loss.backward()
    torch.testing.assert_close(loss, model(**lm_inputs(family)).loss, rtol=0.02, atol=0.02)


@every_family
def test_device_map(family, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device_map = infer_auto_device_map(
        model, {"cpu": 6 * size // 10, "disk": 10 * size}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    offloaded = type(model).from_pretrained(tmp_path, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(p.device.type == "meta" for p in offloaded.parameters())
    inputs = batch(family)
    torch.testing.assert_close(offloaded(**inputs).logits, model(**inputs).logits, rtol=1e-5, atol=1e-6)
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}


@every_text_family
def test_embeddings_stay_tied_and_can_be_resized(family, tmp_path):
    model = tiny_moe(family, tie_word_embeddings=True)
    vocabulary = model.config.vocab_size
    model.resize_token_embeddings(vocabulary + 8)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(**batch(family)).logits.shape[-1] == vocabulary + 8
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert_same_model(family, again, model)


@every_text_family
def test_untied_embeddings_stay_untied(family, tmp_path):
    model = tiny_moe(family, tie_word_embeddings=False)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    assert_same_model(family, type(model).from_pretrained(tmp_path), model)


@every_family
@pytest.mark.parametrize("implementation", ["sorted_mm", "batched_mm"])  # compiled, the former is grouped_mm
def test_compile_in_one_graph(family, implementation):
    model = without_dropout(tiny_moe(family)).train()
    model.set_experts_implementation(implementation)
    expected = gradients(copy.deepcopy(model), lm_inputs(family))
    compiled = torch.compile(model, fullgraph="one graph" not in TESTED[family].cannot, backend="aot_eager")
    compiled.zero_grad()
    loss = compiled(**lm_inputs(family)).loss
    loss.backward()
    got = loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same(got, expected, tolerance=1e-4)


@every_family
def test_compile_in_evaluation(family):
    model = tiny_moe(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = batch(family)
    with torch.no_grad():
        expected = real_logits(family, model, inputs)
        torch.testing.assert_close(real_logits(family, compiled, inputs), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_saved_and_loaded_is_the_same_model(family, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_model(family, again, model)
    by_auto = getattr(transformers, TESTED[family].lm).from_pretrained(tmp_path)
    assert type(by_auto) is type(model)


@every_family
def test_a_partial_load_initialises_what_is_missing(family, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path)
    more_layers, info = type(model).from_pretrained(tmp_path, moe_layers=[0, 1, 2], output_loading_info=True)
    block = block_name(family)
    missing = {name.rpartition(f"{block}.")[2] for name in info["missing_keys"]}
    experts = {n.rpartition(f"{block}.")[2] for n in model.state_dict() if f".{block}.experts." in n}
    assert missing == {"gate.weight", *experts}
    assert len(experts) >= 2
    states = more_layers.state_dict()
    for name in info["missing_keys"]:
        deviation = states[name].std().item()
        assert deviation == 0 if name.endswith("_bias") else 0.005 < deviation < 0.03
    same = [name for name in model.state_dict() if name in states]
    assert all(torch.equal(states[name], model.state_dict()[name]) for name in same)


@every_family
def test_deepcopy(family):
    model = tiny_moe(family)
    assert torch.equal(copy.deepcopy(model)(**batch(family)).logits, model(**batch(family)).logits)


@every_family
@pytest.mark.parametrize("target", ["attention", "experts", "router"])
def test_peft_trains_saves_loads_and_merges(family, target, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path / "base")
    block = block_name(family)
    up = expert_name(model).rpartition(f"{block}.")[2]
    options = {
        "attention": {"target_modules": list(TESTED[family].attention)},
        "experts": {"target_modules": [], "target_parameters": [f"{block}.{up}", f"{block}.experts.down_proj"]},
        "router": {"target_modules": list(TESTED[family].attention), "modules_to_save": ["gate"]},
    }[target]
    peft_model = get_peft_model(model, LoraConfig(r=4, lora_dropout=0.0, **options))
    optimizer = torch.optim.SGD([p for p in peft_model.parameters() if p.requires_grad], lr=1.0)
    before = peft_model(**batch(family)).logits
    for _ in range(2):
        peft_model.train()(**lm_inputs(family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = peft_model.eval()(**batch(family)).logits
    assert not torch.allclose(before, trained)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch(family)).logits, trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**batch(family)).logits, trained, rtol=1e-4, atol=1e-5)


# Auto class of the head -> task, and whether its pipeline answers as it should.
PIPELINES = {
    "AutoModelForMaskedLM": (
        "fill-mask",
        lambda pipe: len(pipe(f"the dog sat on the {pipe.tokenizer.mask_token}")) == 5,
    ),
    "AutoModelForCausalLM": (
        "text-generation",
        lambda pipe: pipe("abc", max_new_tokens=3)[0]["generated_text"].startswith("abc"),
    ),
    "AutoModelForCTC": (
        "automatic-speech-recognition",
        lambda pipe: isinstance(pipe(numpy.sin(numpy.arange(400.0)))["text"], str),
    ),
    "AutoModelForAudioClassification": (
        "audio-classification",
        lambda pipe: {a["label"] for a in pipe(numpy.sin(numpy.arange(400.0)))} == {"LABEL_0", "LABEL_1"},
    ),
    "AutoModelForImageClassification": (
        "image-classification",
        lambda pipe: {a["label"] for a in pipe(Image.new("RGB", (24, 20), "red"))} == {"LABEL_0", "LABEL_1"},
    ),
}


@every_family
def test_pipelines(family, tmp_path):
    save_processors(family, tmp_path)
    tiny_moe(family).save_pretrained(tmp_path)
    task, answers_well = PIPELINES[TESTED[family].lm]
    pipe = pipeline(task, model=str(tmp_path))
    assert type(pipe.model).__name__ == lm_class(family)
    assert answers_well(pipe)


@every_text_family
def test_feature_extraction(family, tmp_path):
    save_processors(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    features = pipeline("feature-extraction", model=tiny_moe(family).base_model, tokenizer=tokenizer)("the dog")
    assert len(features[0][0]) == 32
