"""Single experts: compared, taken out, put in again, and opened, on real files."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import batch, tiny_moe

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


def export(command, made, output, *options):
    code, out, err = command("experts", "export", made / "base", made / "tuned", output, "--json", *options)
    assert code == 0, err
    return json.loads(out)


def outputs(folder, **options):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, **options)
    with torch.no_grad():
        return model(**batch(FAMILY)).logits, model


HOW = {
    "full": (),
    "xor": (),
    "delta": (),
    "low-rank": ("--rank", "2"),
    "sparse": ("--density", "0.5"),
}


@pytest.mark.parametrize("how", HOW)
def test_exports_and_opens_beside_its_base(how, made, tmp_path, hf_moe_command):
    shutil.copytree(made / "base", tmp_path / "base")
    said = export(hf_moe_command, made, tmp_path / "art", "--as", how, *HOW[how])
    held = json.loads((tmp_path / "art" / "experts_config.json").read_text())
    assert said["experts"] == ["0.1", "2.3"]
    assert said["complete"]
    assert said["bytes"] == (tmp_path / "art" / "experts.safetensors").stat().st_size
    assert said["times_smaller"] > 1
    assert not list((tmp_path / "art").glob("model*.safetensors"))
    assert load_file(tmp_path / "art" / "experts.safetensors").keys() == held["tensors"].keys()

    wanted, tuned = outputs(made / "tuned")
    got, opened = outputs(tmp_path / "art")
    base, base_model = outputs(made / "base")
    assert type(opened) is type(tuned)
    if how in ("full", "xor"):
        assert said["error"] == 0
        assert torch.equal(got, wanted)
        assert not torch.equal(base, wanted)
        opened.save_pretrained(tmp_path / "whole")  # what is saved from it is an ordinary checkpoint
        assert torch.equal(outputs(tmp_path / "whole")[0], wanted)
    else:
        assert 0 < said["error"] < 1
        assert (got - wanted).norm() < (base - wanted).norm()
        for entry in held["tensors"].values():
            assert miss(opened, tuned, entry) == pytest.approx(
                entry["error"] * miss(base_model, tuned, entry), rel=1e-4
            )


def miss(opened, tuned, entry):
    """How far what an entry holds is from the tuned model's."""
    count = torch.Size(entry["shape"]).numel()
    one, other = (
        model.state_dict()[entry["into"]].flatten()[entry["start"] :][:count].double() for model in (opened, tuned)
    )
    return (one - other).norm().item()
