"""ONNX through Transformers' exporter: onnxruntime gives what PyTorch gives, padding included, for other numbers of
rows and tokens than the model was exported with."""

import onnxruntime
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter

import hf_moe
from tests.conftest import FAMILIES, batch, tiny_moe
from tests.families import DECODERS
from tests.serving.conftest import alone

ONE_LAYER = {"num_hidden_layers": 1, "moe_layers": [0]}


def export(model, family):
    flags = {"use_cache": False} if family in DECODERS else {}
    return OnnxExporter().export(model, {**batch(family), **flags}, OnnxConfig(dynamic=True))


@torch.no_grad()
def assert_same(exported, model, family):
    """All outputs, the router's too."""
    for rows, length in ((1, 7), (3, 12)):
        inputs = batch(family, rows=rows, length=length, seed=1)
        found, expected = dict(exported(**inputs).items()), dict(model(**inputs).items())
        expected.pop("past_key_values", None)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


EXPORT = """
from transformers import AutoModelForMaskedLM, AutoTokenizer
from transformers.exporters import OnnxConfig, OnnxExporter
moe, folder, *texts = sys.argv[1:]
model = AutoModelForMaskedLM.from_pretrained(moe, trust_remote_code=True)
sample = AutoTokenizer.from_pretrained(moe)(texts, padding=True, return_tensors="pt")
OnnxExporter().export(model, dict(sample), OnnxConfig(dynamic=True)).save_pretrained(folder)
print("null")
"""


def test_a_checkpoint_is_exported_by_its_own_code_and_runs_without(pair, tmp_path):
    dense, moe = pair("bert")
    folder = tmp_path / "onnx"
    alone(EXPORT, moe, folder, "the dog sat", "war and peace", cwd=tmp_path)
    texts = ["the dog sat on the [MASK]", "war", "peace on the mat"]
    sample = AutoTokenizer.from_pretrained(dense)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModelForMaskedLM.from_pretrained(dense)(**sample).logits

    session = onnxruntime.InferenceSession(folder / "model.onnx")
    [logits] = session.run(["logits"], {name: value.numpy() for name, value in sample.items()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=0, atol=2e-6)
    loaded = ExportedModel.from_pretrained(folder)
    torch.testing.assert_close(loaded(**sample).logits, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("implementation", "family", "head", "config"),
    [
        ("sorted_mm", "bert", None, {"router_type": "expert_choice", "output_router_logits": True}),
        ("batched_mm", "bert", "BertMoeForSequenceClassification", {"router_type": "laplace"}),
        ("eager", "bert", "BertMoeModel", {"router_type": "top_p"}),
        ("grouped_mm", "llama", None, {}),
    ],
)
def test_every_implementation_is_exported(implementation, family, head, config):
    model = tiny_moe(family, head, **ONE_LAYER, **config)
    model.set_experts_implementation(implementation)
    assert_same(export(model, family), model, family)


def test_a_native_mixture_is_exported(dense_folder, tmp_path):
    dense = dense_folder("llama", num_hidden_layers=1)
    hf_moe.upcycle(dense, tmp_path / "mixtral", num_experts=4, target="native", verify=False)
    exported = export(AutoModelForCausalLM.from_pretrained(tmp_path / "mixtral"), "llama")
    assert_same(exported, AutoModelForCausalLM.from_pretrained(dense), "llama")


def prompts(rows, length, seed):
    """The last is padded, on the left as generation wants it."""
    inputs = batch("gpt2", rows=rows, length=length, padding=False, seed=seed)
    inputs["attention_mask"][-1, :3] = 0
    return inputs


def test_two_graphs_generate_what_the_model_generates():
    model = tiny_moe("gpt2", n_layer=1, moe_layers=[0])
    exported = OnnxExporter().export_for_generation(model, prompts(2, 10, seed=0), OnnxConfig(dynamic=True))
    first, next_ = exported.runners["prefill"], exported.runners["decode"]

    inputs = prompts(3, 6, seed=1)
    ids, mask = inputs.values()
    expected = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    said = first(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for _ in range(8):
        token = said.logits[:, -1:].argmax(-1)
        ids, mask = torch.cat([ids, token], 1), torch.cat([mask, torch.ones_like(token)], 1)
        place = mask.sum(1, keepdim=True) - 1
        said = next_(input_ids=token, attention_mask=mask, position_ids=place, past_key_values=said.past_key_values)
    assert ids.tolist() == expected.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exported(family):
    model = tiny_moe(family)
    assert_same(export(model, family), model, family)
