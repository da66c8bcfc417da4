"""Reading: exactly what safetensors reads, from a folder or the Hub's cache, old names and all."""

import json
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import hf_moe
from hf_moe.convert import FAMILIES as TABLES
from hf_moe.convert import open_checkpoint, plan_upcycle
from hf_moe.recipe import UpcycleRecipe
from tests.conftest import batch, dense_classes
from tests.families import TESTED


def copied(folder, to):
    return shutil.copytree(folder, to)


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file({name: tensor for old, tensor in load_file(file).items() for name in change(old)}, file)


def test_reads_what_safetensors_reads(tmp_path):
    dtypes = [
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    ]
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).dtype == tensor.dtype


def test_a_file_cut_short_while_it_is_read_is_an_error_not_a_crash(dense_folder, tmp_path):
    folder = copied(dense_folder("bert"), tmp_path / "dense")
    checkpoint = open_checkpoint(folder)
    last = max(checkpoint.tensors.values(), key=lambda info: info.start)
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(last.start + 3)
    with pytest.raises(hf_moe.errors.SourceError, match="ends inside tensor"):
        checkpoint.read(last.name)


def upcycled(folder, tmp_path, **options):
    return hf_moe.upcycle(folder, tmp_path / "moe", num_experts=4, **options)


def same_outputs(family, dense, moe):
    with torch.no_grad():
        one, other = (AutoModel.from_pretrained(folder).eval()(**batch(family)) for folder in (dense, moe))
    torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_old_names_of_norms_and_buffers(dense_folder, tmp_path):
    folder = copied(dense_folder("bert"), tmp_path / "dense")

    def age(name):
        yield name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    rewrite(folder, age)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "bert.embeddings.position_ids": torch.arange(64)[None]}, folder / "model.safetensors")
    made = upcycled(folder, tmp_path)
    assert made.certificate["passed"]
    assert list(made.plan.dropped) == ["bert.embeddings.position_ids"]
    assert not any(name.endswith(("gamma", "beta")) for name in load_file(made.path / "model.safetensors"))


def test_wav2vec2_as_it_lies_on_the_hub(dense_folder, tmp_path):
    """Its weight norm under the old names; no vector for SpecAugment, which only training uses."""
    folder = copied(dense_folder("wav2vec2"), tmp_path / "dense")
    old = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}

    def age(name):
        if not name.endswith("masked_spec_embed"):
            yield next((name.replace(new, before) for new, before in old.items() if new in name), name)

    rewrite(folder, age)
    made = upcycled(folder, tmp_path)
    assert made.certificate["passed"]
    names = load_file(made.path / "model.safetensors").keys()
    assert not any(name.endswith(("weight_g", "masked_spec_embed")) for name in names)
    _, info = hf_moe.Wav2Vec2MoeForCTC.from_pretrained(made.path, output_loading_info=True)
    assert info["missing_keys"] == {"wav2vec2.masked_spec_embed"}


@pytest.mark.parametrize("name", TABLES["whisper"].encoder_of)
def test_whisper_leaves_its_decoder_behind(name, tmp_path):
    torch.manual_seed(0)
    whole = getattr(transformers, name)(TESTED["whisper"].tiny(encoder_layers=1, decoder_layers=2))
    whole.save_pretrained(tmp_path / "dense")
    made = upcycled(tmp_path / "dense", tmp_path)
    assert made.certificate["passed"]
    assert made.certificate["dense"]["class"] == "WhisperEncoder"
    assert all("decoder." in dropped for dropped in made.plan.dropped)
    inputs = batch("whisper")
    encoder = hf_moe.WhisperMoeEncoder.from_pretrained(made.path)
    expected = whole.get_encoder().eval()(**inputs).last_hidden_state
    torch.testing.assert_close(encoder(**inputs).last_hidden_state, expected)
    head = hf_moe.WhisperMoeForAudioClassification.from_dense(tmp_path / "dense", num_experts=4, num_labels=3)
    assert head(**inputs).logits.shape == (2, 3)
    torch.testing.assert_close(head.encoder.eval()(**inputs).last_hidden_state, expected)


def test_gpt2_as_it_lies_on_the_hub(dense_folder, tmp_path):
    """No prefix, although the class has a head; causal masks among the weights."""
    folder = copied(dense_folder("gpt2"), tmp_path / "dense")
    rewrite(folder, lambda name: [name.removeprefix("transformer.")])
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64) for layer in range(3)}
    save_file({**load_file(folder / "model.safetensors"), **masks}, folder / "model.safetensors")
    made = upcycled(folder, tmp_path)
    assert made.certificate["passed"]
    assert set(made.plan.dropped) == set(masks)
    assert "transformer.h.0.mlp.experts.up_proj" in load_file(made.path / "model.safetensors")


@pytest.mark.parametrize("family", [name for name, row in TESTED.items() if row.old_buffers])
def test_buffers_that_old_checkpoints_hold_are_dropped(family, dense_folder, tmp_path):
    folder = copied(dense_folder(family), tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    prefix = getattr(transformers, TESTED[family].lm)._model_mapping[type(TESTED[family].tiny())].base_model_prefix
    buffers = {f"{prefix}.{name}": torch.ones(1, 1, 64, 64) for name in TESTED[family].old_buffers}
    save_file({**weights, **buffers}, folder / "model.safetensors")
    made = upcycled(folder, tmp_path)
    assert made.certificate["passed"]
    assert set(made.plan.dropped) == set(buffers)


def test_parts_of_other_heads_come_along(dense_folder, tmp_path):
    """bert-base-uncased names BertForMaskedLM and holds the pooler and the next-sentence head as well."""
    folder = copied(dense_folder("bert", "BertForPreTraining"), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    made = upcycled(folder, tmp_path)
    assert made.certificate["passed"]
    before, after = (load_file(path / "model.safetensors") for path in (folder, made.path))
    for name in ("bert.pooler.dense.weight", "cls.seq_relationship.weight"):
        assert torch.equal(before[name], after[name])
    same_outputs("bert", folder, made.path)


def test_a_checkpoint_that_names_no_class_is_a_body(dense_folder, tmp_path):
    folder = copied(dense_folder("bert", "BertModel"), tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    assert upcycled(folder, tmp_path).certificate["passed"]


def test_tied_weights_saved_twice_stay_tied(dense_folder, tmp_path):
    folder = copied(dense_folder("gpt2"), tmp_path / "dense")
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights["transformer.wte.weight"].clone()}, folder / "model.safetensors")
    made = upcycled(folder, tmp_path)
    model = hf_moe.GPT2MoeLMHeadModel.from_pretrained(made.path)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_from_the_hubs_cache(dense_folder, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--tiny-bert"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for file in dense_folder("bert").iterdir():
        shutil.copy(file, repository / "blobs" / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    checkpoint = open_checkpoint("someone/tiny-bert")
    assert (checkpoint.source, checkpoint.revision) == ("someone/tiny-bert", commit)
    made = upcycled("someone/tiny-bert", tmp_path)
    assert made.certificate["passed"]
    config = json.loads((made.path / "config.json").read_text())
    assert config["upcycled_from"]["source"] == "someone/tiny-bert"
    assert config["upcycled_from"]["revision"] == commit


def test_a_plan_reads_headers_only(dense_folder, monkeypatch):
    checkpoint = open_checkpoint(dense_folder("bert"))
    monkeypatch.setattr(type(checkpoint), "read", None)
    monkeypatch.setattr(type(checkpoint), "read_pieces", None)
    plan = plan_upcycle(checkpoint, UpcycleRecipe(base_model="x"))
    assert not plan.problems
    assert plan.tensors


def test_a_body_whose_configuration_names_a_head(dense_folder, tmp_path):
    """As sentence encoders lie on the Hub: the class they were pretrained with is named, its head left out."""
    dense = tmp_path / "dense"
    body = dense_classes("bert")["BertModel"].from_pretrained(dense_folder("bert"))
    body.save_pretrained(dense)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    made = upcycled(dense, tmp_path)
    assert made.certificate["passed"]
    assert made.certificate["moe"]["class"] == "BertMoeModel"
    assert any("its head is not here" in note for note in made.plan.notes)
