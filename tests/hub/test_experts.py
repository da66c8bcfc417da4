"""Single experts: compared, taken out, put in again, and opened, on real files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import tiny_moe

FAMILY = "bert"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a base; `tuned`, with experts 0.1 and 2.3 and the first's row of the router changed."""
    folder = tmp_path_factory.mktemp("mixtures")
    model = tiny_moe(FAMILY)
    model.save_pretrained(folder / "base")
    tune(folder / "base", folder / "tuned", {"0": [1], "2": [3]}, routers={"0": [1]})
    return folder


def tune(base, output, experts, routers=None, scale=0.01, seed=0):
    """A copy of a mixture of ours, some of whose experts moved by a change of rank 2 and noise."""
    shutil.copytree(base, output)
    tensors = load_file(output / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        layer = next((part for part in name.split(".") if part.isdigit()), None)
        rows = (experts if ".experts." in name else routers or {}).get(layer, [])
        if ".mlp.experts." in name or ".mlp.gate." in name:
            for row in rows:
                change = torch.randn(tensor[row].shape, generator=generator) * scale
                tensor[row] += change.to(tensor.dtype)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})


def test_diff_finds_what_changed(made, hf_moe_command):
    code, out, _ = hf_moe_command("experts", "diff", made / "base", made / "tuned", "--json")
    found = json.loads(out)
    assert code == 0
    assert list(found["experts"]) == ["0.1", "2.3"]
    assert all(0 < change < 1 for change in found["experts"].values())
    assert found["routers"] == ["0.1"]
    assert found["unchanged_experts"] == 6
    assert not any(found[f"others_{what}"] for what in ("changed", "added", "removed", "settings"))


def test_diff_sees_the_sign_of_a_zero_and_other_tensors(made, tmp_path, hf_moe_command):
    shutil.copytree(made / "base", tmp_path / "one")
    shutil.copytree(made / "base", tmp_path / "other")
    for folder, zero in (("one", 0.0), ("other", -0.0)):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        tensors["bert.encoder.layer.0.mlp.experts.up_proj"][2, 0, 0] = zero
        if folder == "other":
            tensors["bert.embeddings.LayerNorm.weight"][0] += 1
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    _, out, _ = hf_moe_command("experts", "diff", tmp_path / "one", tmp_path / "other", "--json")
    found = json.loads(out)
    assert found["experts"] == {"0.2": 0.0}
    assert found["others_changed"] == ["bert.embeddings.LayerNorm.weight"]
