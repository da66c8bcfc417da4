"""`hf-moe routing` as a user types it: what it writes, for every family that reads text, and what it refuses."""

import builtins
import json
from functools import partial
from importlib import util

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_moe
from hf_moe.cli.spread import spread
from hf_moe.convert import open_checkpoint, open_mixture
from hf_moe.convert.similarity import expert_similarity
from hf_moe.routing import RoutingStats
from tests.conftest import TEXT_FAMILIES, WORDS, save_tokenizer, tiny_moe
from tests.routing.test_stats import NATIVE, native

FILES = {"routing.json", "report.html", "load.png", "together.png"}


@pytest.fixture
def run(hf_moe_command, monkeypatch, tmp_path):
    """Runs `hf-moe routing ARGUMENTS` in a folder of its own -> (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    return partial(hf_moe_command, "routing")


@pytest.fixture
def texts(tmp_path):
    """Two files of different words."""
    words = [word for word in WORDS if "#" not in word]
    for name, some in (("law", words[7:]), ("pets", words[:7])):
        lines = [" ".join(some[(i + j) % len(some)] for j in range(6)) for i in range(8)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def save(model, family, folder):
    model.save_pretrained(folder)
    save_tokenizer(family, folder)
    return folder


@pytest.fixture
def moe(tmp_path):
    return save(tiny_moe("bert"), "bert", tmp_path / "moe")


@pytest.mark.parametrize("name", [*TEXT_FAMILIES, *NATIVE])
def test_a_report_of_every_family_that_reads_text(name, run, texts):
    family = "bert" if name in NATIVE else name
    moe = save(native(name) if name in NATIVE else tiny_moe(name), family, texts / "moe")
    code, out, err = run(moe, "--data", "law.txt", "pets.txt", "--output", "report", "--json")
    assert code == 0, err
    assert {file.name for file in (texts / "report").iterdir()} == FILES
    report = json.loads((texts / "report" / "routing.json").read_text())
    assert json.loads(out) == report | {"output": "report"}
    assert report["passages"] == 16
    assert report["num_experts"] == 4
    assert report["advice"]
    stats = RoutingStats.from_json(report["stats"])
    assert [layer["load"] for layer in report["layers"]] == stats.load.tolist()
    assert stats.counts.sum(1).tolist() == [2 * report["tokens"]] * len(stats.layers)
    page = (texts / "report" / "report.html").read_text()
    assert page.count('class="passage"') == 12
    assert "Specialisation" not in page


def test_domains_are_told_apart(run, texts, moe):
    code, out, err = run(moe, "--domains", "law=law.txt", "pets=pets.txt", "--output", "report")
    assert code == 0, err
    assert "report.html" in out
    report = json.loads((texts / "report" / "routing.json").read_text())
    assert report["specialisation"]["passages"] == {"law": 8, "pets": 8}
    assert report["specialisation"]["p_value"] < 0.05
    assert (texts / "report" / "domains.png").is_file()
    assert "Specialisation" in (texts / "report" / "report.html").read_text()


def test_a_domain_of_one_line_gets_no_significance(run, texts, moe):
    (texts / "one.txt").write_text("the dog sat\n")
    code, out, err = run(moe, "--domains", "law=law.txt", "one=one.txt", "--output", "report")
    assert code == 0, err
    assert "one has one passage, so no significance can be given" in out
    assert json.loads((texts / "report" / "routing.json").read_text())["specialisation"]["p_value"] is None


def test_the_folder_has_a_name_by_itself_and_is_kept(run, texts, moe):
    assert run("moe", "--data", "law.txt", "-q")[:2] == (0, "")
    before = (texts / "moe-routing" / "routing.json").read_bytes()
    code, _, err = run(moe, "--data", "pets.txt")
    assert (code, err) == (2, "Error: moe-routing: exists already; --overwrite replaces it.\n")
    assert (texts / "moe-routing" / "routing.json").read_bytes() == before
    assert run(moe, "--data", "pets.txt", "--overwrite")[0] == 0
    assert (texts / "moe-routing" / "routing.json").read_bytes() != before


def test_a_model_is_not_overwritten_by_a_report(run, texts, moe):
    (texts / "other").mkdir()
    (texts / "other" / "config.json").write_text("{}")
    code, _, err = run(moe, "--data", "law.txt", "--output", "other", "--overwrite")
    assert (code, err) == (
        2,
        "Error: other: is neither empty nor a folder with routing.json, so it is not overwritten.\n",
    )
    assert [file.name for file in (texts / "other").iterdir()] == ["config.json"]


def test_text_does_not_inject(run, texts, moe):
    (texts / "law.txt").write_text("the dog </script><script>alert(1)</script> <b>sat</b>\nthe cat\n" * 3)
    assert run(moe, "--data", "law.txt", "--output", "report")[0] == 0
    page = (texts / "report" / "report.html").read_text()
    assert page.count("<script") == 2
    assert "<b>sat" not in page


def nan_router(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "layer.2." in name and name.endswith("gate.weight"))
    tensors[name] = tensors[name].fill_(float("nan"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def no_tokenizer(folder):
    for file in folder.iterdir():
        if "token" in file.name or "vocab" in file.name:
            file.unlink()


# What is wrong -> (arguments, what is done to the mixture, exit code, what is said).
BAD = {
    "no text": ([], None, 2, "There is no text to route"),
    "an empty file": (["--data", "empty.txt"], None, 2, "empty.txt: holds no text"),
    "another encoding": (["--data", "latin.txt"], None, 1, "latin.txt: can't be read as text"),
    "no such file": (["--data", "nowhere.txt"], None, 1, "nowhere.txt: can't be read as text"),
    "one domain": (["--domains", "law=law.txt"], None, 2, "name two or more"),
    "a domain without a name": (["--domains", "law.txt"], None, 2, "should be NAME=FILE"),
    "a domain twice": (["--domains", "a=law.txt", "a=pets.txt"], None, 2, "'a' stands twice"),
    "an empty domain": (["--domains", "a=law.txt", "b=empty.txt"], None, 2, "empty.txt: holds no text"),
    "NaN logits": (["--data", "law.txt"], nan_router, 1, "layer 2: the router's logits are NaN"),
    "no tokenizer": (["--data", "law.txt"], no_tokenizer, 1, "has no tokenizer"),
    "output in the model": (["--data", "law.txt", "--output", "moe/report"], None, 2, "overlaps the source"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_one_line_and_writes_nothing(what, run, texts, moe):
    (texts / "empty.txt").write_text("\n \n")
    (texts / "latin.txt").write_bytes("für".encode("latin-1"))
    arguments, change, exit_code, said = BAD[what]
    if change is not None:
        change(moe)
    before = sorted(texts.rglob("*"))
    code, out, err = run("moe", *arguments)
    assert (code, out, err.count("\n")) == (exit_code, "", 1), err
    assert err.startswith("Error: ")
    assert said in err
    assert sorted(texts.rglob("*")) == before


def test_a_dense_model_is_told_what_to_do(run, texts, dense_folder):
    code, _, err = run(dense_folder("bert"), "--data", "law.txt")
    assert code == 1
    assert "is dense (model_type 'bert')" in err
    assert "hf-moe upcycle" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("family", ["vit", "wav2vec2"])
def test_a_model_that_reads_no_text_is_refused(family, run, texts):
    tiny_moe(family).save_pretrained(texts / "moe")
    code, _, err = run("moe", "--data", "law.txt")
    assert (code, err.count("\n")) == (1, 1)
    assert "not text; hf_moe.routing.gather" in err


@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_missing_extra_is_named_before_any_work(missing, run, texts, moe, monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name, *rest: None if name == missing else found(name, *rest))
    monkeypatch.setattr("hf_moe.convert.observe.read_texts", lambda file: builtins.exit("work"))
    code, _, err = run("moe", "--data", "law.txt")
    assert (code, err) == (2, f"Error: The report needs {missing}; pip install 'hf_moe[plots]'.\n")


def test_options_take_values_in_a_row():
    assert spread(["m", "--data", "a", "b", "--json", "c", "--data", "d", "--domains", "x=1", "y=2"]) == [
        *("m", "--data", "a", "--data", "b", "--json", "c"),
        *("--data", "d", "--domains", "x=1", "--domains", "y=2"),
    ]


@pytest.mark.parametrize("name", ["bert", "llama", "mixtral"])
def test_similarity_is_the_cosine_of_the_weights(name, tmp_path):
    model = native(name) if name in NATIVE else tiny_moe(name)
    model.save_pretrained(tmp_path)
    found = expert_similarity(open_mixture(open_checkpoint(tmp_path)))
    experts = [module for module_name, module in model.named_modules() if module_name.endswith(".experts")]
    assert len(found) == len(experts)
    for value, module in zip(found.values(), experts, strict=True):
        names = [n for n, _ in module.named_parameters() if not n.endswith("_bias")]
        rows = torch.cat([getattr(module, n).detach().double().flatten(1) for n in names], dim=1)
        cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        apart = [cosines[i, j].item() for i in range(4) for j in range(4) if i != j]
        assert value == pytest.approx(sum(apart) / 12, abs=1e-9)


def test_similarity_of_copies_is_one(dense_folder, tmp_path):
    made = hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe", num_experts=3, verify=False)
    found = expert_similarity(open_mixture(open_checkpoint(made.path)))
    assert list(found.values()) == pytest.approx([1.0] * 3)
