"""Single experts: compared, taken out, put in again, and opened, on real files."""

import json
import shutil
from pathlib import Path

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
    assert found["others_settings"] == []
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


@pytest.mark.parametrize("how", ["full", "xor"])
def test_apply_gives_the_tuned_mixture(how, made, tmp_path, hf_moe_command):
    export(hf_moe_command, made, tmp_path / "art", "--as", how)
    code, _, err = hf_moe_command("experts", "apply", made / "base", tmp_path / "art", tmp_path / "again")
    assert code == 0, err
    got, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "again", made / "tuned"))
    assert got.keys() == wanted.keys()
    assert all(same(got[name], wanted[name]) for name in wanted)
    assert torch.equal(outputs(tmp_path / "again")[0], outputs(made / "tuned")[0])
    assert json.loads((tmp_path / "again" / "apply.json").read_text())["experts"] == ["0.1", "2.3"]


def same(one, other):
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8)) and one.dtype == other.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["full", "xor"])
def test_exact_ways_keep_every_bit(how, dtype, tmp_path, hf_moe_command):
    """Zeros with a sign, and NaN with what they carry."""
    tiny_moe(FAMILY).to(dtype).save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    for folder, odd in (("base", [0.0, -0.0, 1.0]), ("tuned", [-0.0, 0.0, torch.nan])):
        tensors = load_file(tmp_path / folder / "model.safetensors")
        weight = tensors["bert.encoder.layer.2.mlp.experts.down_proj"]
        weight[3, 0, :3] = torch.tensor(odd).to(dtype)
        if folder == "tuned":
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            weight.view(bits)[3, 0, 3] = -5  # a NaN with its sign and a payload
        save_file(tensors, tmp_path / folder / "model.safetensors", metadata={"format": "pt"})
    export(hf_moe_command, tmp_path, tmp_path / "art", "--as", how)
    code, _, err = hf_moe_command("experts", "apply", tmp_path / "base", tmp_path / "art", tmp_path / "again")
    assert code == 0, err
    got, wanted = (load_file(tmp_path / folder / "model.safetensors") for folder in ("again", "tuned"))
    assert all(same(got[name], wanted[name]) for name in wanted)
    model = outputs(tmp_path / "art")[1].state_dict()
    name = "bert.encoder.layer.2.mlp.experts.down_proj"
    assert same(model[name], wanted[name])
    code, _, err = hf_moe_command(
        "experts", "export", tmp_path / "base", tmp_path / "tuned", tmp_path / "no", "--as", "delta"
    )
    assert code == 2
    assert "NaN" in err


@pytest.mark.parametrize(
    ("family", "config"), [("llama", {}), ("bert", {"expert_rank": 2}), ("bert", {"router_type": "sigmoid"})]
)
def test_other_forms_of_experts(family, config, tmp_path, hf_moe_command):
    """Gated ones, ones of low rank, and routers with more than rows: exported as xor, and applied again."""
    shared = {"shared_expert_intermediate_size": 16}
    tiny_moe(family, **config, **shared).save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    for name in tensors:
        if ".experts." in name and (not config.get("expert_rank") or name.endswith(("_a", "_b"))):
            tensors[name][1] += 0.01
        elif ".gate." in name:
            tensors[name][2] += 0.01
        elif "shared_expert" in name:
            tensors[name] += 0.01
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    said = export(hf_moe_command, tmp_path, tmp_path / "art", "--as", "xor")
    assert said["complete"]
    assert sorted(said["experts"]) == ["0.1", "0.2", "0.shared", "2.1", "2.2", "2.shared"]
    code, _, err = hf_moe_command("experts", "apply", tmp_path / "base", tmp_path / "art", tmp_path / "again")
    assert code == 0, err
    got = load_file(tmp_path / "again" / "model.safetensors")
    assert all(same(got[name], tensors[name]) for name in tensors)


def test_native_mixtures(dense_folder, tmp_path, hf_moe_command):
    from transformers import AutoModelForCausalLM, MixtralForCausalLM

    assert (
        hf_moe_command(
            "upcycle",
            dense_folder("llama"),
            tmp_path / "base",
            "--target",
            "native",
            "--num-experts",
            4,
            "--no-verify",
        )[0]
        == 0
    )
    tuned = MixtralForCausalLM.from_pretrained(tmp_path / "base")
    with torch.no_grad():
        tuned.model.layers[1].mlp.experts.gate_up_proj[2] *= 1.5
        tuned.model.layers[1].mlp.gate.weight[2] += 0.5
    tuned.save_pretrained(tmp_path / "tuned")
    found = json.loads(hf_moe_command("experts", "diff", tmp_path / "base", tmp_path / "tuned", "--json")[1])
    assert list(found["experts"]) == found["routers"] == ["1.2"]
    export(hf_moe_command, tmp_path, tmp_path / "art", "--as", "xor")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "art", trust_remote_code=True)
    inputs = batch("llama")
    with torch.no_grad():
        assert torch.equal(opened(**inputs).logits, tuned.eval()(**inputs).logits)
    assert type(opened) is MixtralForCausalLM
    with pytest.raises(OSError):  # without its code nothing of it is taken for a model
        MixtralForCausalLM.from_pretrained(tmp_path / "art")


def test_compose_takes_experts_of_several(made, tmp_path, hf_moe_command):
    tune(made / "base", tmp_path / "law", {"0": [1]}, {"0": [1]}, seed=1)
    tune(made / "base", tmp_path / "pets", {"0": [1], "2": [0]}, {"0": [1]}, seed=2)
    for name in ("law", "pets"):
        code, _, err = hf_moe_command(
            "experts", "export", made / "base", tmp_path / name, tmp_path / f"{name}-art", "--as", "xor"
        )
        assert code == 0, err
    law, pets = (str(tmp_path / f"{name}-art") for name in ("law", "pets"))
    code, _, err = hf_moe_command("experts", "compose", made / "base", tmp_path / "clash", law, pets)
    assert code == 2
    assert "expert 0.1" in err
    assert not (tmp_path / "clash").exists()
    code, _, err = hf_moe_command("experts", "compose", made / "base", tmp_path / "both", law, f"{pets}#0.1=2.2,2.*")
    assert code == 0, err
    got, base, one, other = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "both", made / "base", tmp_path / "law", tmp_path / "pets")
    )
    for part in ("experts.up_proj", "experts.up_proj_bias", "experts.down_proj", "gate.weight"):
        first, second = (f"bert.encoder.layer.{layer}.mlp.{part}" for layer in (0, 2))
        assert same(got[first][1], one[first][1])
        assert same(got[second][2], other[first][1])
        assert same(got[second][0], other[second][0])
        assert same(got[first][[0, 2, 3]], base[first][[0, 2, 3]])
    code, *_ = hf_moe_command("experts", "compose", made / "base", tmp_path / "rows", law, "--router", "base")
    gate = "bert.encoder.layer.0.mlp.gate.weight"
    assert same(load_file(tmp_path / "rows" / "model.safetensors")[gate], base[gate])


def test_refuses_what_does_not_fit(made, tmp_path, hf_moe_command):
    export(hf_moe_command, made, tmp_path / "art")
    tiny_moe("gpt2").save_pretrained(tmp_path / "gpt2")
    tiny_moe(FAMILY, moe_intermediate_size=32).save_pretrained(tmp_path / "narrow")
    tiny_moe(FAMILY, num_experts=2).save_pretrained(tmp_path / "fewer")
    tiny_moe(FAMILY).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    for name in ("named", "pointed", "unlike", "cut"):
        shutil.copytree(tmp_path / "art", tmp_path / name)
    (tmp_path / "named" / "experts.safetensors").rename(tmp_path / "named" / "model.safetensors")
    edit(tmp_path / "pointed" / "config.json", transformers_weights="experts.safetensors")
    edit(tmp_path / "unlike" / "experts_config.json", tensors={})
    weights = (tmp_path / "cut" / "experts.safetensors").read_bytes()
    (tmp_path / "cut" / "experts.safetensors").write_bytes(weights[:-9])
    base, tuned, art = made / "base", made / "tuned", tmp_path / "art"
    out = tmp_path / "out"
    for line, code, words in [
        (("apply", tmp_path / "gpt2", art, out), 2, ("gpt2_moe", "bert_moe")),
        (("apply", tmp_path / "narrow", art, out), 2, ("width", "64", "32")),
        (("apply", tmp_path / "fewer", art, out), 2, ("num_experts", "4", "2")),
        (("compose", base, out, f"{art}#9.1"), 2, ("no expert 9.1",)),
        (("compose", base, out, f"{art}#0.1=0.7"), 2, ("no expert 0.7",)),
        (("compose", base, out, f"{art}#0.1=0.shared"), 2, ("no expert 0.shared",)),
        (("compose", base, out, art, "--router", "fit"), 2, ("along, base",)),
        (("apply", base, tmp_path / "named", out), 1, ("model.safetensors", "by accident")),
        (("apply", base, tmp_path / "pointed", out), 1, ("transformers_weights",)),
        (("apply", base, tmp_path / "unlike", out), 1, ("names no tensors",)),
        (("apply", base, tmp_path / "cut", out), 1, ("cut short",)),
        (("apply", base, tmp_path / "nowhere" / "at" / "all", out), 1, ("no such folder",)),
        (("apply", base, tuned, out), 1, ("model.safetensors",)),
        (("export", base, tmp_path / "gpt2", out), 2, ("gpt2_moe", "bert_moe")),
        (("export", base, tmp_path / "narrow", out), 2, ("64", "32")),
        (("export", base, tmp_path / "half", out), 2, ("BF16", "one dtype")),
        (("export", base, base, out), 2, ("nothing to export",)),
        (("export", base, tuned, out, "--experts", "0.9"), 2, ("no expert 0.9",)),
        (("export", base, tuned, out, "--as", "zip"), 2, ("low-rank",)),
        (("export", base, tuned, out, "--as", "low-rank"), 2, ("rank",)),
        (("export", base, tuned, out, "--rank", "2"), 2, ("low-rank",)),
        (("export", base, tuned, out, "--as", "sparse", "--density", "0"), 2, ("share",)),
        (("export", base, tuned, art), 2, ("--overwrite",)),
        (("export", base, tuned, base), 2, ("overlaps",)),
        (("pull", str(art), out), 2, ("is a folder",)),
    ]:
        got, _, err = hf_moe_command("experts", *line)
        assert got == code, (line, err)
        assert all(word in err for word in words), (line, err)
        assert len(err.strip().splitlines()) == 1, (line, err)
    assert not out.exists()


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_other_changes_are_not_dropped_silently(made, tmp_path, hf_moe_command):
    shutil.copytree(made / "tuned", tmp_path / "tuned")
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["bert.embeddings.LayerNorm.weight"] += 1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    line = ("experts", "export", made / "base", tmp_path / "tuned", tmp_path / "art")
    code, _, err = hf_moe_command(*line)
    assert code == 2
    assert "LayerNorm" in err
    code, out, _ = hf_moe_command(*line, "--leave-others", "--json")
    assert code == 0
    assert not json.loads(out)["complete"]


def test_a_choice_of_experts_is_exported(made, tmp_path, hf_moe_command):
    said = export(hf_moe_command, made, tmp_path / "one", "--experts", "2.3")
    assert said["experts"] == ["2.3"]
    assert not said["complete"]
    said = export(hf_moe_command, made, tmp_path / "layer", "--experts", "0.*", "--as", "sparse")
    assert said["experts"] == ["0.0", "0.1", "0.2", "0.3"]  # those that are named, changed or not


def test_low_rank_keeps_to_the_error_it_is_given(made, tmp_path, hf_moe_command):
    loose = export(hf_moe_command, made, tmp_path / "loose", "--as", "low-rank", "--max-error", "0.9")
    tight = export(hf_moe_command, made, tmp_path / "tight", "--as", "low-rank", "--max-error", "0.5")
    assert 0.5 < loose["error"] <= 0.9
    assert tight["error"] <= 0.5
    assert loose["bytes"] < tight["bytes"]


@pytest.mark.parametrize("how", ["full", "xor"])
def test_a_failed_export_leaves_nothing(how, made, tmp_path, hf_moe_command, monkeypatch):
    import hf_moe.hub.export as module

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_beside", full)
    code, _, err = hf_moe_command("experts", "export", made / "base", made / "tuned", tmp_path / "art", "--as", how)
    assert code == 1
    assert "No space left" in err
    assert not list(tmp_path.iterdir())


def test_a_base_that_is_nowhere(made, tmp_path, hf_moe_command):
    export(hf_moe_command, made, tmp_path / "art")
    with pytest.raises(OSError, match="experts_base"):
        outputs(tmp_path / "art")
    got, _ = outputs(tmp_path / "art", experts_base=str(made / "base"))
    assert torch.equal(got, outputs(made / "tuned")[0])
    half, _ = outputs(tmp_path / "art", experts_base=str(made / "base"), dtype=torch.bfloat16)
    assert torch.equal(half, outputs(made / "tuned", dtype=torch.bfloat16)[0])


def test_a_class_opens_it_without_auto(made, tmp_path, hf_moe_command):
    from hf_moe import BertMoeForMaskedLM

    shutil.copytree(made / "base", tmp_path / "base")
    export(hf_moe_command, made, tmp_path / "art", "--as", "xor")
    with torch.no_grad():
        got = BertMoeForMaskedLM.from_pretrained(tmp_path / "art")(**batch(FAMILY)).logits
    assert torch.equal(got, outputs(made / "tuned")[0])


def test_sharded_bases(made, tmp_path, hf_moe_command):
    tiny_moe(FAMILY).save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    code, _, err = hf_moe_command(
        "experts", "export", tmp_path / "base", made / "tuned", tmp_path / "art", "--as", "xor", "-q"
    )
    assert code == 0, err
    assert torch.equal(outputs(tmp_path / "art")[0], outputs(made / "tuned")[0])


def test_what_generates(tmp_path, hf_moe_command):
    from transformers import AutoModelForCausalLM

    tiny_moe("gpt2").save_pretrained(tmp_path / "base")
    shutil.copytree(tmp_path / "base", tmp_path / "tuned")
    edit(tmp_path / "tuned" / "generation_config.json", max_new_tokens=7)
    tensors = load_file(tmp_path / "tuned" / "model.safetensors")
    tensors["transformer.h.2.mlp.experts.down_proj"][1] *= -1
    save_file(tensors, tmp_path / "tuned" / "model.safetensors", metadata={"format": "pt"})
    said = export(hf_moe_command, tmp_path, tmp_path / "art", "--as", "xor")
    assert said["experts"] == ["2.1"]
    got, wanted = (
        AutoModelForCausalLM.from_pretrained(tmp_path / folder, trust_remote_code=True, device_map="cpu").generate(
            torch.tensor([[5, 6, 7]]), do_sample=False
        )
        for folder in ("art", "tuned")
    )
    assert wanted.shape == (1, 10)
    assert torch.equal(got, wanted)


def test_the_figures_of_the_document_are_those_measured():
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "experts_export.json").read_text())
    document = (root / "docs" / "experts.md").read_text()
    assert f"for {found.pop('steps')['count']} steps" in document
    for way in {name.partition(", ")[2] for name in found}:
        rows = [found[f"{dtype}, {way}"] for dtype in ("float32", "bfloat16")]
        cells = [f"{row['mb']:.0f} | {row['error']:.2g} | {row['output']:.2g}" for row in rows]
        assert f"| `{way}` | {' | '.join(cells)} |" in document
