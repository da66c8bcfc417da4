"""Recipes that are packaged, for those who have no checkout: `hf-moe recipes`."""

import json

import pytest
import yaml

from hf_moe.recipes import files, launchers
from hf_moe.training import TrainRecipe

EVERY = {file.stem: file for file in files()} | {f"accelerate/{file.stem}": file for file in launchers()}


def test_all_are_listed_by_the_names_they_have(hf_moe_command):
    code, out, _ = hf_moe_command("recipes")
    assert code == 0
    assert all(f"{name} " in out for name in EVERY)
    assert json.loads(hf_moe_command("recipes", "--json")[1]).keys() == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
def test_one_is_printed_to_be_kept_and_changed(name, hf_moe_command):
    assert hf_moe_command("recipes", name) == (0, EVERY[name].read_text(), "")


def test_one_that_there_is_not(hf_moe_command):
    code, out, err = hf_moe_command("recipes", "ddp")
    assert (code, out) == (2, "")
    assert err.startswith("Error: recipe 'ddp': is no packaged recipe; choose from causal-lm, ")
    assert "accelerate/ddp" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("file", launchers(), ids=lambda file: file.stem)
def test_precision_is_left_to_the_training_recipe(file, bf16, monkeypatch, tmp_path):
    told = yaml.safe_load(file.read_text())["mixed_precision"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", told)  # as `accelerate launch` does
    keys = {"task": "causal-lm", "model_name_or_path": "./gpt2", "output_dir": "./out", "bf16": bf16}
    args = TrainRecipe.from_dict(keys).training_arguments(tmp_path)
    assert args.mixed_precision == ("bf16" if bf16 else "no")
