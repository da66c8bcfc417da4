"""The certificate tells the truth: it passes what is equal, and finds and names what is not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

import hf_moe
from hf_moe.convert import certificate as module
from hf_moe.convert import certify, conversion, open_checkpoint
from hf_moe.convert.families import FAMILIES as TABLES
from hf_moe.errors import CertificateError, SourceError
from tests.conftest import FAMILIES, TEXT_FAMILIES, block_name, dense_classes
from tests.families import TESTED

LAYER = {name: table.layer for name, table in TABLES.items()}


@pytest.fixture
def pair(dense_folder, tmp_path):
    """family -> (dense folder, mixture's folder, mixture)."""

    def make(family):
        made = hf_moe.upcycle(dense_folder(family), tmp_path / "moe", num_experts=4, verify=False)
        return dense_folder(family), made.path, made.plan.moe_class.from_pretrained(made.path)

    return make


def certified(dense, moe, **options):
    return certify(open_checkpoint(dense), open_checkpoint(moe), **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_it_measures(family, pair):
    dense, moe, _ = pair(family)
    certificate = certified(dense, moe)
    assert certificate["passed"]
    for dtype in ("float32", "float64"):
        for inputs in ("text", "random") if family in TEXT_FAMILIES else ("random",):
            run = certificate[dtype][inputs]
            assert set(run["outputs"]["logits"]) == {"max_abs", "max_rel", "max_rel_by_column"}
            assert len(run["hidden_states"]) == 4
            assert abs(run["kl"]) < 1e-10
            assert run["loss"]["dense"] > 0
            assert abs(run["loss"]["difference"]) < 1e-5
    assert certificate["float32"]["dense_rounding"] > 0
    if TESTED[family].is_decoder:
        assert certificate["float32"]["greedy"] == {"prompts": 14, "new_tokens": 61, "identical": 14}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1e-5, 1.0])
def test_a_changed_expert_is_found_and_its_layer_named(family, size, pair):
    dense, moe, model = pair(family)
    block = model.base_model.get_submodule(f"{LAYER[family].format(layer=1)}.{block_name(family)}")
    with torch.no_grad():
        block.experts.down_proj[3, 0] += size
    model.save_pretrained(moe)
    certificate = certified(dense, moe)
    assert not certificate["passed"]
    bisect = certificate["float64"]["bisect"]
    assert bisect["summary"] == "the experts of layer 1 are not its dense network"
    wrong = [entry["layer"] for entry in bisect["layers"] if entry["feed_forward"] > 1e-12]
    assert wrong == [1]
    assert certificate["float64"]["random"]["kl"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_change_outside_the_experts_is_told_apart(family, pair):
    dense, moe, model = pair(family)
    with torch.no_grad():
        model.base_model.get_parameter(f"{LAYER[family].format(layer=2)}.{TESTED[family].attention_weight}").mul_(1.01)
    model.save_pretrained(moe)
    certificate = certified(dense, moe)
    for dtype in ("float64", "float32"):
        assert certificate[dtype]["bisect"]["summary"] == "layer 2 differs outside its feed-forward network"


def edit_tensor(folder, name, change):
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_expert_that_no_token_reaches_is_compared_too(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", num_experts=64, num_experts_per_tok=1, verify=False)
    name = "bert.encoder.layer.0.mlp.experts.down_proj"
    model = hf_moe.BertMoeForMaskedLM.from_pretrained(made.path).eval()
    batches, _ = module.make_batches(open_checkpoint(dense_folder("bert")), model.config)
    reached = set()
    model.bert.encoder.layer[0].mlp.gate.register_forward_hook(
        lambda m, a, out: reached.update(out[2].flatten().tolist())
    )
    for one in batches:
        model(**one.inputs)
    unreached = sorted(set(range(64)) - reached)
    assert unreached

    def zero(tensor):
        tensor[unreached] = 0
        return tensor

    edit_tensor(made.path, name, zero)
    certificate = certified(dense_folder("bert"), made.path)
    assert certificate["float64"]["passed"], "no token meets the changed experts"
    assert certificate["weights"]["different"] == [name]
    assert not certificate["passed"]


def huge_column(value):
    def change(bias):
        bias[60] = value
        return bias

    return change


@pytest.mark.parametrize("value", [-3e38, -float("inf")])
def test_a_huge_or_infinite_value_hides_nothing(value, dense_folder, tmp_path):
    """Some checkpoints mask unused tokens by a bias."""
    dense = Path(shutil.copytree(dense_folder("bert"), tmp_path / "dense"))
    edit_tensor(dense, "cls.predictions.bias", huge_column(value))
    made = hf_moe.upcycle(dense, tmp_path / "exact", allow_nonfinite=True)
    assert made.certificate["passed"]
    json.loads((made.path / "certificate.json").read_text(), parse_constant=pytest.fail)
    noisy = hf_moe.upcycle(dense, tmp_path / "noisy", allow_nonfinite=True, noise_std=0.5)
    assert not noisy.certificate["float64"]["passed"]
    edit_tensor(made.path, "cls.predictions.bias", huge_column(0.0))
    assert not certified(dense, made.path)["float64"]["passed"]


def test_nan_in_one_output_of_two_is_a_difference(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert", "BertForPreTraining"), tmp_path / "moe")
    edit_tensor(made.path, "cls.seq_relationship.weight", lambda weight: weight * float("nan"))
    certificate = certified(dense_folder("bert", "BertForPreTraining"), made.path)
    assert not certificate["float32"]["passed"]
    json.dumps(certificate, allow_nan=False)


@pytest.mark.parametrize("num_labels", [64, 3])
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_as_many_labels_as_tokens(family, num_labels, dense_folder, tmp_path):
    name = {"bert": "BertForSequenceClassification", "gpt2": "GPT2ForSequenceClassification"}[family]
    made = hf_moe.upcycle(dense_folder(family, name, num_labels=num_labels), tmp_path / "moe")
    assert made.certificate["passed"]
    assert "kl" in made.certificate["float64"]["random"]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_return_sequences": 4, "do_sample": True},
        {"return_dict_in_generate": True},
        {"num_beams": 4},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"stop_strings": ["a"]},
    ],
)
def test_settings_of_generation_do_not_matter(settings, dense_folder, tmp_path):
    dense = Path(shutil.copytree(dense_folder("gpt2"), tmp_path / "dense"))
    (dense / "generation_config.json").write_text(json.dumps(settings))
    certificate = hf_moe.upcycle(dense, tmp_path / "moe").certificate
    assert certificate["float32"]["greedy"] == {"prompts": 14, "new_tokens": 61, "identical": 14}
    assert json.loads((tmp_path / "moe" / "generation_config.json").read_text()) == settings


@pytest.mark.parametrize(("name", "text"), [("tokenizer.json", '{"model": {"type": "New"}}'), ("vocab.txt", "")])
def test_a_tokenizer_that_does_not_work_is_done_without(name, text, dense_folder, tmp_path):
    dense = Path(shutil.copytree(dense_folder("bert"), tmp_path / "dense"))
    (dense / "tokenizer.json").unlink()
    (dense / name).write_text(text)
    certificate = hf_moe.upcycle(dense, tmp_path / "moe").certificate
    assert certificate["passed"]
    assert certificate["inputs"]["text"].startswith("none")


@pytest.mark.parametrize("config", [{"return_dict": False}, {"return_dict": None}])
def test_odd_but_legal_configurations(config, dense_folder, tmp_path):
    dense = Path(shutil.copytree(dense_folder("bert"), tmp_path / "dense"))
    values = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**values, **config}))
    assert hf_moe.upcycle(dense, tmp_path / "moe").certificate["passed"]


def test_a_configuration_that_relies_on_defaults(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=1, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "dense")
    sizes = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "n_positions": 16}
    (tmp_path / "dense" / "config.json").write_text(json.dumps({**sizes, "n_embd": 8, "n_layer": 1, "n_head": 1}))
    assert hf_moe.upcycle(tmp_path / "dense", tmp_path / "moe").certificate["passed"]


def test_nan_is_a_difference(pair):
    dense, moe, model = pair("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].mlp.experts.up_proj[:] = float("nan")
    model.save_pretrained(moe)
    assert not certified(dense, moe)["passed"]


def test_wrong_gates_are_a_difference(pair):
    """What the certificate exists for: gates that do not sum to 1 scale every layer's output."""
    dense, moe, model = pair("gpt2")
    model.config.norm_topk_prob = False
    model.save_pretrained(moe)
    certificate = certified(dense, moe)
    assert not certificate["passed"]
    assert certificate["float64"]["max_rel"] > 1e-3


def test_an_upcycle_that_is_not_exact_leaves_nothing(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(module.TOLERANCE, "float64", 1e-30)
    with pytest.raises(CertificateError, match="the mixture is not the dense function"):
        hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe")
    assert not list(tmp_path.iterdir())


def test_without_a_tokenizer_it_says_so(dense_folder, tmp_path):
    dense = tmp_path / "dense"
    dense_classes("gpt2")["GPT2LMHeadModel"].from_pretrained(dense_folder("gpt2")).save_pretrained(dense)
    certificate = hf_moe.upcycle(dense, tmp_path / "moe").certificate
    assert certificate["passed"]
    assert certificate["inputs"]["text"].startswith("none: the source has no tokenizer")
    assert "text" not in certificate["float32"]


def test_another_dense_model_of_the_same_shape_does_not_pass(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe")
    other = tmp_path / "other"
    model = dense_classes("bert")["BertForMaskedLM"].from_pretrained(dense_folder("bert"))
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias += 0.01
    model.save_pretrained(other)
    certificate = certified(other, made.path)
    assert not certificate["passed"]
    assert not certificate["moe"]["made_from_this_dense"]


@pytest.mark.parametrize("form", TESTED["wav2vec2"].variants, ids=str)
def test_only_real_frames_are_compared(form, dense_folder):
    checkpoint = open_checkpoint(dense_folder("wav2vec2", **form))
    model = module.load_model(dense_classes("wav2vec2")["Wav2Vec2ForCTC"], checkpoint, "float32")
    [one], _ = module.make_batches(checkpoint, model.config, "input_values")
    assert one.is_padded
    outputs = module.run_model(model, one)
    alone = [
        model(values[: int(mask.sum())][None], output_hidden_states=True)
        for values, mask in zip(one.inputs["input_values"], one.mask, strict=True)
    ]
    assert len(outputs["logits"]) == sum(output.logits.shape[1] for output in alone)
    assert len(outputs["hidden_states.2"]) == sum(output.hidden_states[2].shape[1] for output in alone)


def test_a_configuration_that_leads_to_no_inputs(dense_folder, tmp_path):
    dense = Path(shutil.copytree(dense_folder("wav2vec2"), tmp_path / "dense"))
    values = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**values, "conv_stride": [10**9, 10**9]}))
    with pytest.raises(SourceError, match="describes no input_values that can be made"):
        hf_moe.upcycle(dense, tmp_path / "moe")


def test_progress_is_told(dense_folder, tmp_path):
    class Recorder(conversion.Progress):
        def __init__(self):
            self.stages, self.bytes, self.promised = [], 0, 0

        def stage(self, name):
            self.stages.append(name)

        def total(self, nbytes):
            self.promised = nbytes

        def wrote(self, nbytes):
            self.bytes += nbytes

    recorder = Recorder()
    hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", progress=recorder)
    assert recorder.stages == [
        "reading",
        "writing",
        "comparing weights",
        "comparing in float64",
        "comparing in float32",
    ]
    assert recorder.bytes == recorder.promised > 0
