"""The commands as a user types them: what they print, write and return."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoModel, AutoTokenizer

import hf_moe
from hf_moe.errors import UsageError
from tests.conftest import FAMILIES, TEXT_FAMILIES, batch
from tests.families import TESTED


@pytest.mark.parametrize("family", FAMILIES)
def test_upcycle_inspect_verify(family, dense_folder, hf_moe_command, tmp_path):
    dense, moe = dense_folder(family), tmp_path / "moe"
    code, out, err = hf_moe_command("upcycle", dense, moe, "--num-experts", 4, "--layers", "every-2")
    assert code == 0, err
    assert "the same function" in out
    expected = {"config.json", "model.safetensors", "certificate.json", "recipe.yaml", "LICENSE.txt", "moe_layers.py"}
    names = {file.name for file in moe.iterdir()}
    assert expected <= names
    assert ("tokenizer_config.json" in names) == (TESTED[family].tokenizer is not None)
    assert ("preprocessor_config.json" in names) == (TESTED[family].preprocessor is not None)

    code, out, _ = hf_moe_command("inspect", moe, "--json")
    described = json.loads(out)
    assert code == 0
    assert described["family"] == family
    assert described["layers"] == 3
    assert described["moe_layers"] == [1]
    assert described["num_experts"] == 4
    assert described["parameters"] > described["active_parameters"]
    assert described["certificate"]["passed"]
    assert described["certificate"]["weights_unchanged"]
    assert described["upcycled_from"]["source"] == dense.name
    assert AutoModel.from_pretrained(moe).config.moe_layers == [1]

    (moe / "certificate.json").unlink()
    code, out, _ = hf_moe_command("verify", dense, moe)
    assert code == 0
    assert "the same function" in out
    assert json.loads((moe / "certificate.json").read_text())["passed"]
    assert {file.name for file in tmp_path.iterdir()} == {"moe"}, "something was left behind"


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_the_tokenizer_comes_along_and_knows_its_class(family, dense_folder, hf_moe_command, tmp_path):
    dense = tmp_path / "dense"
    dense.mkdir()
    for file in dense_folder(family).iterdir():
        (dense / file.name).write_bytes(file.read_bytes())
    settings = json.loads((dense / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"]  # as old checkpoints are, which leave it to config.json's model_type
    (dense / "tokenizer_config.json").write_text(json.dumps(settings))
    assert hf_moe_command("upcycle", dense, tmp_path / "moe", "-q")[0] == 0
    (tmp_path / "moe" / "config.json").unlink()  # a process without hf_moe can't use it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer("the dog")["input_ids"] == AutoTokenizer.from_pretrained(dense)("the dog")["input_ids"]


@pytest.mark.parametrize("family", [family for family in FAMILIES if TESTED[family].preprocessor is not None])
def test_the_preprocessor_comes_along_and_knows_its_class(family, dense_folder, hf_moe_command, tmp_path):
    dense = Path(shutil.copytree(dense_folder(family), tmp_path / "dense"))
    kinds = {"image_processor_type": AutoImageProcessor, "feature_extractor_type": AutoFeatureExtractor}
    [(name, auto_class)] = [item for item in kinds.items() if item[0] in TESTED[family].preprocessor]
    settings = {key: value for key, value in TESTED[family].preprocessor.items() if key != name}
    (dense / "preprocessor_config.json").write_text(json.dumps(settings))  # as old checkpoints are
    assert hf_moe_command("upcycle", dense, tmp_path / "moe", "-q")[0] == 0
    expected = auto_class.from_pretrained(dense).to_dict()
    (tmp_path / "moe" / "preprocessor_config.json").replace(tmp_path / "moe" / "named.json")
    shutil.copy(dense / "preprocessor_config.json", tmp_path / "moe")
    assert auto_class.from_pretrained(tmp_path / "moe").to_dict() == expected  # by the mixture's configuration
    (tmp_path / "moe" / "named.json").replace(tmp_path / "moe" / "preprocessor_config.json")
    (tmp_path / "moe" / "config.json").unlink()  # a process without hf_moe can't use it
    assert auto_class.from_pretrained(tmp_path / "moe").to_dict() == expected


def test_dry_run_writes_nothing_and_tells_the_bytes(dense_folder, hf_moe_command, tmp_path):
    dense = dense_folder("bert")
    code, out, _ = hf_moe_command("upcycle", dense, tmp_path / "moe", "--dry-run", "--json")
    plan = json.loads(out)
    assert code == 0
    assert not list(tmp_path.iterdir())
    assert plan["exactness"] == "exact"
    hf_moe_command("upcycle", dense, tmp_path / "moe", "-q")
    weights = tmp_path / "moe" / "model.safetensors"
    with safe_open(weights, "pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no iterator of its own)
    assert plan["bytes"] == sum(t.numel() * t.element_size() for t in tensors)
    assert plan["parameters"] == sum(t.numel() for t in tensors)
    code, out, _ = hf_moe_command("upcycle", dense, tmp_path / "other", "--dry-run")
    assert "exact" in out
    assert f"{plan['bytes']:,}" in out


def test_a_recipe_with_overrides(dense_folder, hf_moe_command, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"base_model": str(dense_folder("gpt2")), "num_experts": 4, "moe_layers": [1]}))
    code, out, err = hf_moe_command("upcycle", recipe, tmp_path / "moe", "--num-experts", 6, "--json")
    assert code == 0, err
    assert json.loads(out)["num_experts"] == 6
    assert json.loads(out)["certificate"]["passed"]
    saved = yaml.safe_load((tmp_path / "moe" / "recipe.yaml").read_text())
    assert saved["num_experts"] == 6
    assert saved["moe_layers"] == [1]
    assert saved["seed"] == 0
    assert saved["base_model"] == dense_folder("gpt2").name  # a path of this machine is nobody's business


def test_quiet_says_nothing(dense_folder, hf_moe_command, tmp_path):
    assert hf_moe_command("upcycle", dense_folder("bert"), tmp_path / "moe", "-q", "--no-verify") == (0, "", "")
    assert not (tmp_path / "moe" / "certificate.json").exists()
    assert hf_moe_command("verify", dense_folder("bert"), tmp_path / "moe", "-q") == (0, "", "")


def test_overwrite_replaces_the_folder(dense_folder, hf_moe_command, tmp_path):
    moe = tmp_path / "moe"
    moe.mkdir()
    (moe / "old.txt").write_text("old")
    for options in ([], ["--overwrite"]):  # only what looks like a checkpoint is ever replaced
        assert hf_moe_command("upcycle", dense_folder("bert"), moe, "-q", *options)[0] == 2
        assert [file.name for file in moe.iterdir()] == ["old.txt"]
    (moe / "config.json").write_text("{}")
    assert hf_moe_command("upcycle", dense_folder("bert"), moe, "-q")[0] == 2
    assert hf_moe_command("upcycle", dense_folder("bert"), moe, "-q", "--overwrite")[0] == 0
    assert (moe / "model.safetensors").exists()
    assert not (moe / "old.txt").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["moe"]


def test_verify_fails_beyond_the_tolerance_and_names_the_layer(dense_folder, hf_moe_command, tmp_path):
    dense, moe = dense_folder("bert"), tmp_path / "moe"
    hf_moe_command("upcycle", dense, moe, "-q")
    changed = hf_moe.BertMoeForMaskedLM.from_pretrained(moe)
    with torch.no_grad():
        changed.bert.encoder.layer[1].mlp.experts.down_proj[2] *= 1.01
    changed.save_pretrained(moe)
    code, out, _ = hf_moe_command("inspect", moe, "--json")
    assert not json.loads(out)["certificate"]["weights_unchanged"]
    code, out, _ = hf_moe_command("verify", dense, moe)
    assert code == 1
    assert "not the same function" in out
    assert "layer 1" in out
    assert not json.loads((moe / "certificate.json").read_text())["passed"]
    assert hf_moe_command("verify", dense, moe, "--tolerance", 0.5)[0] == 0


def test_verify_on_text_of_ones_own(dense_folder, hf_moe_command, tmp_path):
    hf_moe_command("upcycle", dense_folder("bert"), tmp_path / "moe", "-q")
    text = tmp_path / "text.txt"
    text.write_text("the dog sat\n\na cat on the mat\n")
    _, out, _ = hf_moe_command("verify", dense_folder("bert"), tmp_path / "moe", "--text", text, "--json")
    assert json.loads(out)["inputs"]["text"].startswith("2 texts")
    assert hf_moe_command("verify", dense_folder("bert"), tmp_path / "moe", "--text", tmp_path / "none.txt")[0] == 1


@pytest.mark.multiprocess
def test_the_installed_command():
    command = Path(sys.executable).with_name("hf-moe")
    done = subprocess.run([command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert {"upcycle", "inspect", "verify"} <= set(done.stdout.split())
    wrong = subprocess.run([command, "upcyle"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "upcycle" in wrong.stderr
    missing = subprocess.run([command, "inspect", "./nowhere"], capture_output=True, text=True)
    assert (missing.returncode, missing.stdout, missing.stderr) == (1, "", "Error: ./nowhere: no such folder.\n")


def test_the_same_in_python(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", num_experts=4)
    assert made.certificate["passed"]
    model = hf_moe.BertMoeForMaskedLM.from_dense(dense_folder("bert"), num_experts=4, seed=0)
    loaded = hf_moe.BertMoeForMaskedLM.from_pretrained(made.path)
    assert torch.equal(model(**batch("bert")).logits, loaded(**batch("bert")).logits)
    assert model.name_or_path == str(dense_folder("bert"))
    with_head = hf_moe.BertMoeForSequenceClassification.from_dense(
        dense_folder("bert"), num_experts=4, num_labels=3, dtype=torch.bfloat16
    )
    assert with_head(**batch("bert")).logits.shape == (2, 3)
    assert with_head.dtype == torch.bfloat16
    assert with_head.config.num_experts == 4
    with pytest.raises(UsageError, match="did you mean 'num_experts'"):
        hf_moe.BertMoeForMaskedLM.from_dense(dense_folder("bert"), num_expert=4)
    with pytest.raises(UsageError, match="is a bert; GPT2MoeLMHeadModel is made from a gpt2"):
        hf_moe.GPT2MoeLMHeadModel.from_dense(dense_folder("bert"))
