"""Rows of routers fitted to texts, for experts that were put in: against the same sums done by hand."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, MixtralForCausalLM

import hf_moe
from hf_moe.convert.fit import hold_out
from tests.conftest import save_processors, save_tokenizer, tiny_moe
from tests.hub.test_experts import same, tune

WORDS = {
    "law": ["war", "peace", "nation", "law", "people"],
    "pets": ["dog", "cat", "sat", "mat", "light"],
    "rest": ["the", "a", "on", "free", "earth"],
}
GATE = "bert.encoder.layer.{}.mlp.gate.weight"


def lines(name, count=40):
    drawn = random.Random(name)
    return [" ".join(drawn.choices(WORDS[name], k=drawn.randint(3, 9))) for _ in range(count)]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders: a base of 4 experts in layers 0 and 2; `law`, experts 0.1, 2.0 and 2.1 of it; `pets`, 0.2; texts."""
    folder = tmp_path_factory.mktemp("fitted")
    prepare(folder, tiny_moe("bert"))
    return folder


def prepare(folder, model):
    model.save_pretrained(folder / "base")
    save_tokenizer("bert", folder / "base")
    tune(folder / "base", folder / "tuned-law", {"0": [1], "2": [0, 1]}, {"0": [1], "2": [0, 1]}, scale=0.1, seed=1)
    tune(folder / "base", folder / "tuned-pets", {"0": [2]}, {"0": [2]}, scale=0.1, seed=2)
    write_texts(folder)


def write_texts(folder):
    for name in WORDS:
        (folder / f"{name}.txt").write_text("\n".join(lines(name)))


@pytest.fixture(scope="module")
def artefacts(made):
    export_all(made)
    return made


def export_all(folder):
    from hf_moe.hub.export import export

    for name in ("law", "pets"):
        export(folder / "base", folder / f"tuned-{name}", folder / name)


def compose(command, folder, output, *specs, texts, options=()):
    given = [f"{folder / name if name != 'base' else name}={folder / text}.txt" for name, text in texts.items()]
    specs = [f"{folder}/{spec}" for spec in specs]
    line = ("experts", "compose", folder / "base", output, *specs, "--router", "fitted", "--texts", *given)
    code, out, err = command(*line, *options, "--json")
    assert code == 0, err
    assert json.loads((output / "compose.json").read_text())["routing"] == json.loads(out)["routing"]
    return json.loads(out)


def read_by_router(model, tokenizer, layer, texts):
    """What a layer's router is given, a text at a time, so that nothing is padded -> one (N, D) a text."""
    seen = []
    router = next(m for n, m in model.named_modules() if n.endswith((f"{layer}.mlp.gate",)))
    hook = router.register_forward_hook(lambda module, args, output: seen.append(args[0].flatten(0, -2).double()))
    with torch.no_grad():
        for text in texts:
            model(**tokenizer(text, return_tensors="pt"))
    hook.remove()
    return seen


def by_hand(folder, layer, texts, rest=None, cls=AutoModel, logit_std=None):
    """Directions of the texts' means, less that of the rest or of all, at the scale of the base's logits."""
    model, tokenizer = cls.from_pretrained(folder / "base").eval(), AutoTokenizer.from_pretrained(folder / "base")
    x = [torch.cat(read_by_router(model, tokenizer, layer, hold_out(lines(t)).positive)) for t in texts]
    rows = torch.stack([inputs.mean(0) / inputs.mean(0).norm() for inputs in x])
    [base] = [p.detach().double() for n, p in model.named_parameters() if n.endswith(f"{layer}.mlp.gate.weight")]
    everything = torch.cat(x)
    std = logit_std or (everything @ base.T).var(1, unbiased=False).mean().sqrt()
    rows = rows * std / (everything @ rows.T).var(1, unbiased=False).mean().sqrt()
    return rows - (rows.mean(0) if rest is None else rows[rest]), base


@pytest.mark.parametrize("rest", [False, True], ids=["between specs", "against the rest"])
def test_fitted_rows_are_those_made_by_hand(rest, artefacts, tmp_path, hf_moe_command):
    texts = {"law": "law", "pets": "pets"} | ({"base": "rest"} if rest else {})
    said = compose(hf_moe_command, artefacts, tmp_path / "both", "law#0.1", "pets#0.2", texts=texts)
    got, base, law = (
        load_file(f / "model.safetensors") for f in (tmp_path / "both", artefacts / "base", artefacts / "tuned-law")
    )
    rows, _ = by_hand(artefacts, 0, texts.values(), 2 if rest else None)
    gate = got[GATE.format(0)]
    staying = base[GATE.format(0)][[0, 3]]
    torch.testing.assert_close(gate[[1, 2]].double(), rows[:2] + staying.double().mean(0), rtol=1e-4, atol=1e-5)
    assert same(gate[[0, 3]], staying)
    assert same(got[GATE.format(2)], base[GATE.format(2)])
    up = GATE.format(0).replace("gate.weight", "experts.up_proj")
    assert same(got[up][1], law[up][1])
    assert same(got[up][[0, 3]], base[up][[0, 3]])
    assert said["routing"]["gate"] == "hidden"
    assert said["routing"]["texts"] == {
        name if name == "base" else str(artefacts / name): f"{text}.txt" for name, text in texts.items()
    }
    [entry] = said["routing"]["layers"]
    assert entry["chance"] == pytest.approx((0.25 + 0.25 + 0.5) / 3 if rest else 0.25)
    assert (entry["held_out_tokens"], entry["held_out_texts"]) == pytest.approx(
        shares_by_hand(artefacts, gate, list(texts.values()), [2, 0, 1, 2] if rest else [None, 0, 1, None])
    )


def shares_by_hand(folder, gate, texts, class_of):
    model, tokenizer = (cls.from_pretrained(folder / "base") for cls in (AutoModel, AutoTokenizer))
    tokens, passages = [], []
    for label, name in enumerate(texts):
        logits = [x @ gate.double().T for x in read_by_router(model, tokenizer, 0, hold_out(lines(name)).held_out)]
        tokens.append(sum(class_of[e] == label for e in torch.cat(logits).argmax(1)) / len(torch.cat(logits)))
        passages.append(sum(class_of[one.mean(0).argmax()] == label for one in logits) / len(logits))
    return sum(tokens) / len(tokens), sum(passages) / len(passages)


@pytest.mark.parametrize("gate", ["hidden", "centroid", "lda", "probe"])
def test_where_all_experts_are_put_in_the_rows_are_a_fusions(gate, dense_folder, tmp_path, hf_moe_command):
    """The base of copies computes what the dense model does, so that its routers read the same."""
    dense = dense_folder("bert")
    hf_moe.upcycle(dense, tmp_path / "base", num_experts=2, verify=False)
    write_texts(tmp_path)
    every = {str(layer): [0, 1] for layer in range(3)}
    tune(tmp_path / "base", tmp_path / "tuned-law", every, seed=1)
    tune(tmp_path / "base", tmp_path / "tuned-pets", every, seed=2)
    export_all(tmp_path)
    said = compose(
        hf_moe_command,
        tmp_path,
        tmp_path / "out",
        "law#*.0",
        "pets#*.1",
        texts={"law": "law", "pets": "pets"},
        options=("--gate-mode", gate),
    )
    experts = [{"source_model": str(dense), "texts": str(tmp_path / f"{name}.txt")} for name in ("law", "pets")]
    recipe = {"base_model": str(dense), "experts": experts, "gate_mode": gate}
    fused = hf_moe.fuse(recipe, tmp_path / "fused", verify=False)
    got = load_file(tmp_path / "out" / "model.safetensors")
    for layer in range(3):
        torch.testing.assert_close(got[GATE.format(layer)], fused.plan.routers[layer], rtol=1e-3, atol=1e-4)
    assert len(said["routing"]["layers"]) == 3
    for ours, theirs in zip(said["routing"]["layers"], fused.routing["layers"], strict=True):
        assert ours["chance"] == theirs["chance"] == 0.5
        assert ours["held_out_texts"] == pytest.approx(theirs["held_out_texts"], abs=0.1)
        assert ours["held_out_texts"] >= 0.8


def test_experts_of_one_spec_share_its_row_and_differ_as_theirs_did(artefacts, tmp_path, hf_moe_command):
    texts = {"law": "law", "pets": "pets"}
    compose(hf_moe_command, artefacts, tmp_path / "out", "law#2.*", "pets#0.2", texts=texts)
    got, tuned = (load_file(f / "model.safetensors") for f in (tmp_path / "out", artefacts / "tuned-law"))
    rows, base = by_hand(artefacts, 2, texts.values())
    gate, own = (tensors[GATE.format(2)].double() for tensors in (got, tuned))
    torch.testing.assert_close(gate[:2].mean(0), rows[0] + base[2:].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gate[0] - gate[1], own[0] - own[1], rtol=1e-4, atol=1e-5)


def test_specs_of_one_artefact_are_told_apart_and_may_go_elsewhere(artefacts, tmp_path, hf_moe_command):
    specs = ["law#0.1=0.3", "law#2.0=0.0"]
    compose(hf_moe_command, artefacts, tmp_path / "out", *specs, texts=dict(zip(specs, ("law", "pets"), strict=True)))
    got, base = (load_file(f / "model.safetensors")[GATE.format(0)] for f in (tmp_path / "out", artefacts / "base"))
    rows, _ = by_hand(artefacts, 0, ("law", "pets"))
    torch.testing.assert_close(got[[3, 0]].double(), rows + base[1:3].double().mean(0), rtol=1e-4, atol=1e-5)
    assert same(got[1:3], base[1:3])


def test_whole_artefacts_may_hold_rows_of_the_same_experts(artefacts, tmp_path, hf_moe_command):
    """Training moves all rows of a softmax router; here nothing takes them."""
    for name, seed in (("law", 1), ("pets", 2)):
        everyone = {"0": [0, 1, 2, 3]}
        tune(artefacts / "base", tmp_path / f"tuned-{name}", {"0": [seed]}, everyone, seed=seed)
    shutil.copytree(artefacts / "base", tmp_path / "base")
    write_texts(tmp_path)
    export_all(tmp_path)
    said = compose(hf_moe_command, tmp_path, tmp_path / "out", "law", "pets", texts={"law": "law", "pets": "pets"})
    assert said["experts"] == ["0.1", "0.2"]
    got, base = (load_file(f / "model.safetensors")[GATE.format(0)] for f in (tmp_path / "out", tmp_path / "base"))
    assert same(got[[0, 3]], base[[0, 3]])
    assert not same(got[[1, 2]], base[[1, 2]])


def test_half_precision_stays(tmp_path, hf_moe_command):
    prepare(tmp_path, tiny_moe("bert").to(torch.bfloat16))
    export_all(tmp_path)
    compose(hf_moe_command, tmp_path, tmp_path / "out", "law#0.1", "pets", texts={"law": "law", "pets": "pets"})
    got, base = (load_file(f / "model.safetensors")[GATE.format(0)] for f in (tmp_path / "out", tmp_path / "base"))
    assert got.dtype == torch.bfloat16
    assert same(got[[0, 3]], base[[0, 3]])
    rows, _ = by_hand(tmp_path, 0, ("law", "pets"))
    wanted = rows + base[[0, 3]].double().mean(0)
    assert (got[[1, 2]].double() - wanted).norm() < 0.05 * wanted.norm()


def test_native_mixtures(dense_folder, tmp_path, hf_moe_command):
    hf_moe.upcycle(dense_folder("llama"), tmp_path / "base", num_experts=4, target="native", verify=False)
    save_processors("llama", tmp_path / "base")
    write_texts(tmp_path)
    for name, expert in (("law", 1), ("pets", 2)):
        tuned = MixtralForCausalLM.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            tuned.model.layers[1].mlp.experts.gate_up_proj[expert] *= 1.5
        tuned.save_pretrained(tmp_path / f"tuned-{name}")
    export_all(tmp_path)
    said = compose(hf_moe_command, tmp_path, tmp_path / "out", "law", "pets", texts={"law": "law", "pets": "pets"})
    assert said["routing"]["layers"][0]["layer"] == 1
    rows, base = by_hand(tmp_path, 1, ("law", "pets"), cls=AutoModelForCausalLM)
    gate = MixtralForCausalLM.from_pretrained(tmp_path / "out").model.layers[1].mlp.gate.weight.detach().double()
    torch.testing.assert_close(gate[[1, 2]], rows + base[[0, 3]].mean(0), rtol=1e-3, atol=1e-4)
    assert torch.equal(gate[[0, 3]], base[[0, 3]])


def test_says_how_texts_are_routed(artefacts, tmp_path, hf_moe_command):
    """As a user types it, from the folder where things lie; and the gate that was asked for is the one used."""
    line = ["experts", "compose", artefacts / "base", tmp_path / "out", f"{artefacts}/law#0.1", f"{artefacts}/pets"]
    line += ["--router", "fitted", "--texts", f"{artefacts}/law={artefacts}/law.txt"]
    line += ["--texts", f"{artefacts}/pets={artefacts}/pets.txt", "--gate-mode", "probe"]
    code, out, err = hf_moe_command(*line)
    assert code == 0, err
    assert "layer 0:" in out
    assert "of held-out texts go to their expert" in " ".join(out.split())
    assert "by chance 25%" in " ".join(out.split())
    routing = json.loads((tmp_path / "out" / "compose.json").read_text())["routing"]
    assert routing["gate"] == "probe"
    assert str(artefacts / "law.txt") not in (tmp_path / "out" / "compose.json").read_text()


def test_what_can_not_be_fitted_is_refused_in_a_line(artefacts, tmp_path, hf_moe_command):
    law, pets, base, out = artefacts / "law", artefacts / "pets", artefacts / "base", tmp_path / "out"
    lawful, of_pets = f"{law}={law}.txt", f"{pets}={pets}.txt"
    for name, config in {
        "sigmoid": {"router_type": "sigmoid"},
        "laplace": {"router_type": "laplace"},
        "groups": {"router_group_size": 2},
        "disabled": {"disabled_experts": {"0": [3]}},
    }.items():
        tiny_moe("bert", **config).save_pretrained(tmp_path / name)
    tiny_moe("vit").save_pretrained(tmp_path / "vit")
    shutil.copytree(base, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*", "vocab*"))
    (tmp_path / "empty.txt").write_text("\n \n")
    shutil.copy(f"{law}.txt", tmp_path / "same.txt")
    shared = f"{law}#0.shared"
    both = (law, pets, "--router", "fitted")
    for mixture, words, code, line in [
        (base, ("law", "has no texts", "--texts"), 2, both),
        (base, ("pets", "has no texts"), 2, (*both, "--texts", lawful)),
        (base, ("cats", "no such spec", str(pets)), 2, (*both, "--texts", lawful, of_pets, "cats=x.txt")),
        (base, ("law#0.2", "no such spec"), 2, (*both, "--texts", lawful, of_pets, f"{law}#0.2=x.txt")),
        (base, ("SPEC", "NAME=FILE"), 2, (*both, "--texts", "SPEC")),
        (base, ("stands twice",), 2, (*both, "--texts", lawful, lawful, of_pets)),
        (base, ("holds no text",), 2, (*both, "--texts", lawful, f"{pets}={tmp_path}/empty.txt")),
        (base, ("nowhere.txt", "can't be read"), 1, (*both, "--texts", lawful, f"{pets}=nowhere.txt")),
        (base, ("have the same texts",), 2, (*both, "--texts", lawful, f"{pets}={tmp_path}/same.txt")),
        (base, ("alone", "base=FILE"), 2, (law, "--router", "fitted", "--texts", lawful)),
        (base, ("gate_mode", "probe"), 2, (*both, "--texts", lawful, of_pets, "--gate-mode", "random")),
        (base, ("'along', not 'fitted'",), 2, (law, pets, "--texts", lawful, of_pets)),
        (base, ("'base', not 'fitted'",), 2, (law, "--router", "base", "--gate-mode", "lda")),
        (base, ("no spec", "has a row"), 2, (shared, "--router", "fitted", "--texts", lawful)),
        (base, ("no such spec with routed",), 2, (shared, pets, "--router", "fitted", "--texts", lawful, of_pets)),
        (tmp_path / "mute", ("has no tokenizer",), 1, (*both, "--texts", lawful, of_pets)),
        (tmp_path / "sigmoid", ("'sigmoid'", "bias"), 2, (*both, "--texts", lawful, of_pets)),
        (tmp_path / "laplace", ("'laplace'", "distances"), 2, (*both, "--texts", lawful, of_pets)),
        (tmp_path / "groups", ("in groups",), 2, (*both, "--texts", lawful, of_pets)),
        (tmp_path / "disabled", ("disabled experts",), 2, (*both, "--texts", lawful, of_pets)),
        (tmp_path / "vit", ("pixel_values", "not texts"), 2, (*both, "--texts", lawful, of_pets)),
    ]:
        got, _, err = hf_moe_command("experts", "compose", mixture, out, *line)
        assert got == code, (line, err)
        assert all(word in err for word in words), (line, err)
        assert len(err.strip().splitlines()) == 1, (line, err)
    assert not out.exists()
    assert not list(tmp_path.glob("out*"))


def test_a_broken_base_is_refused(tmp_path, hf_moe_command):
    model = tiny_moe("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[:] = torch.nan
    prepare(tmp_path, model)
    export_all(tmp_path)
    texts = [f"{tmp_path}/{name}={tmp_path}/{name}.txt" for name in ("law", "pets")]
    line = ("experts", "compose", tmp_path / "base", tmp_path / "out", tmp_path / "law", tmp_path / "pets")
    code, _, err = hf_moe_command(*line, "--router", "fitted", "--texts", *texts)
    assert code == 1
    assert "layer 0 makes NaN or Inf" in err
    assert not list(tmp_path.glob("out*"))
