"""Cards: every value from a file, no section without data, and nothing a value can do to the page."""

import json
import random
import re
import shutil

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import hf_moe
from hf_moe.convert.observe import observe
from hf_moe.errors import SourceError
from hf_moe.evaluation import evaluate
from hf_moe.hub import make_card
from hf_moe.hub.card import fenced, inline, plain
from hf_moe.hub.lineage import Base, inherited
from hf_moe.hub.metadata import check_types
from hf_moe.tasks import DataSettings
from hf_moe.training import TrainRecipe, train
from tests.conftest import WORDS

SECTIONS = ["Size", "Use it", "Training", "Evaluation", "Routing", "Limits", "Lineage", "Recipe", "Citation"]
EVIL = [
    "<img src=x onerror=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    "[here](javascript:alert(1))",
    "x\n\n# A heading\n\n---\nlicense: mit\n---",
    "| a | b |",
    "``` \n# out",
    "**bold** ~~no~~ $x$",
]


@pytest.fixture(scope="session")
def results(dense_folder, tmp_path_factory):
    """A trained mixture with all the results there can be, by the commands that make them."""
    folder = tmp_path_factory.mktemp("results")
    drawn = random.Random(0)
    words = [word for word in WORDS if "#" not in word]
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(drawn.choices(words, k=12)) for _ in range(40)) + "\n")
    shutil.copytree(dense_folder("bert"), folder / "dense")
    recipe = {
        "task": "masked-lm",
        "model_name_or_path": str(folder / "dense"),
        "upcycle": {"num_experts": 4},
        "train_file": str(text),
        "validation_file": str(text),
        "max_length": 16,
        "mlm_probability": 0.4,
        "max_steps": 2,
        "use_cpu": True,
        "output_dir": str(folder / "tuned"),
    }
    train(TrainRecipe.from_dict(recipe), quiet=True)
    settings = DataSettings(task="masked-lm", test_file=str(text), max_length=16, mlm_probability=0.4)
    evaluate([folder / "dense", folder / "tuned"], settings, output=folder / "evaluation", resamples=200)
    observe(folder / "tuned", folder / "routing", data=[text])
    return folder


@pytest.fixture
def tuned(results, tmp_path):
    """The same with its results beside it, to be changed."""
    folder = shutil.copytree(results / "tuned", tmp_path / "tuned")
    shutil.copy(results / "evaluation" / "metrics.json", folder)
    for name in ("routing.json", "load.png"):
        shutil.copy(results / "routing" / name, folder)
    return folder


@pytest.fixture(scope="session")
def upcycled(dense_folder, tmp_path_factory):
    return hf_moe.upcycle(dense_folder("bert"), tmp_path_factory.mktemp("cards") / "moe", num_experts=4).path


def card_of(folder, *bases):
    return make_card(folder, "ann/model", base_model=bases or ["none"])


def parts(card):
    """Metadata, and section -> text."""
    _, front, body = card.split("---\n", 2)
    heads = re.split(r"^## (.*)$", outside_code(body), flags=re.MULTILINE)
    return yaml.safe_load(front), dict(zip(heads[1::2], heads[2::2], strict=True))


def outside_code(text):
    return re.sub(r"^(`{3,})\w*\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)


def test_every_section_says_what_its_file_says(results, tuned):
    metadata, sections = parts(card_of(tuned))
    assert list(sections) == SECTIONS
    model = hf_moe.BertMoeForMaskedLM.from_pretrained(tuned)
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in sections["Size"]
    assert "| experts in a layer | 4 |" in sections["Size"]
    training = json.loads((tuned / "training.json").read_text())
    assert f"{training['steps']} steps" in sections["Training"]
    assert training["start"]["summary"].replace("_", r"\_") in sections["Training"]
    report = json.loads((tuned / "metrics.json").read_text())
    assert "| | dense | tuned |" in sections["Evaluation"]
    for model in report["models"]:
        assert f"{model['metrics']['nll']:.4g}" in sections["Evaluation"]
    routing = json.loads((tuned / "routing.json").read_text())
    assert sections["Routing"].count("\n| ") == len(routing["layers"]) + 1
    assert "![Share of tokens, by layer and expert](load.png)" in sections["Routing"]
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "fill-mask"
    [index] = metadata["model-index"]
    found = {one["type"]: one["value"] for one in index["results"][0]["metrics"]}
    assert found == report["models"][1]["metrics"]


def test_reports_of_their_own_folders_go_along(results):
    from hf_moe.hub import publish

    reports = [results / "evaluation", results / "routing"]
    made = publish(results / "tuned", "ann/model", dry_run=True, base_model=["none"], reports=reports)
    assert {"routing.json", "metrics.json", "load.png"} <= set(made.files)
    assert "## Routing" in made.card
    with pytest.raises(SourceError, match="no folder of a report"):
        publish(results / "tuned", "ann/model", dry_run=True, base_model=["none"], reports=[results / "dense"])


def test_no_section_without_data(upcycled, tmp_path):
    _, sections = parts(card_of(upcycled))
    assert list(sections) == ["Exactness", "Size", "Use it", "Limits", "Lineage", "Recipe", "Citation"]
    bare = shutil.copytree(upcycled, tmp_path / "bare")
    for name in ("certificate.json", "recipe.yaml", "manifest.json", "LICENSE.txt"):
        (bare / name).unlink()
    _, sections = parts(card_of(bare))
    assert list(sections) == ["Size", "Use it", "Limits", "Lineage", "Citation"]


def test_nothing_is_a_placeholder(upcycled, tuned):
    for folder in (upcycled, tuned):
        card = outside_code(card_of(folder))
        for word in ("None", "More Information", "TODO", "undefined", "nan", "{{", "}}", "{%", "| |\n| |\n"):
            assert word not in card, word
        assert "\n\n\n" not in card_of(folder)


def test_a_certificate_of_other_weights_is_not_shown(upcycled, tmp_path):
    changed = shutil.copytree(upcycled, tmp_path / "changed")
    model = hf_moe.BertMoeForMaskedLM.from_pretrained(changed)
    model.base_model.embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(changed)
    (changed / "manifest.json").unlink()
    _, sections = parts(card_of(changed))
    assert "Exactness" not in sections


def test_fused(dense_folder, tmp_path):
    bases = [str(shutil.copytree(dense_folder("bert"), tmp_path / name)) for name in ("base", "law", "pets")]
    recipe = {"base_model": bases[0], "experts": [{"source_model": one} for one in bases[1:]], "gate_mode": "random"}
    made = hf_moe.fuse(recipe, tmp_path / "fused")
    card = card_of(made.path, "base=ann/base", "law=ann/law", "pets=bob/pets")
    metadata, sections = parts(card)
    assert metadata["base_model"] == ["ann/base", "ann/law", "bob/pets"]
    assert metadata["base_model_relation"] == "merge"
    assert "3 checkpoints: ann/base, ann/law, bob/pets" in card
    assert "Branch-Train-MiX" in card
    assert sections["Lineage"].count("huggingface.co") == 3


def test_what_has_no_history_has_no_card(dense_folder, tmp_path):
    with pytest.raises(SourceError, match="--no-card"):
        card_of(dense_folder("bert"))


@pytest.mark.parametrize("evil", EVIL, ids=range(len(EVIL)))
def test_a_value_is_never_markup(evil, tuned):
    honest = card_of(tuned)
    report = json.loads((tuned / "metrics.json").read_text())
    report["models"][0]["name"] = report["comparisons"][0]["against"] = evil
    report["models"][0]["metrics"][evil] = 0.5
    report["notes"] = [evil]
    report["data"]["files"] = {evil: {}}
    (tuned / "metrics.json").write_text(json.dumps(report))
    training = json.loads((tuned / "training.json").read_text())
    training["task"] = training["start"]["summary"] = evil
    training["versions"] = {evil: evil}
    (tuned / "training.json").write_text(json.dumps(training))
    with open(tuned / "recipe.yaml", "a") as file:
        file.write(f"# {evil}\n")
    card = card_of(tuned)
    assert evil in card  # in the recipe, as it stands
    metadata, sections = parts(card)
    assert list(sections) == list(parts(honest)[1])
    assert metadata.keys() == parts(honest)[0].keys()
    shown = outside_code(card.split("---\n", 2)[2])
    assert "<img" not in shown
    assert not re.search(r"(?<!\\)\[here", shown)
    assert not re.search(r"^# A heading", shown, re.MULTILINE)
    assert (r"\{\{ 7 \* 7 \}\}" in shown) == ("7 * 7" in evil)
    for line in sections["Evaluation"].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 4, line


@given(st.text())
def test_plain_text_is_one_line_without_markup(text):
    shown = plain(text)
    assert not set("<>\n\r\"'") & set(shown)
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]{}#|~!$]", shown.replace("&#39;", ""))


@given(st.text(alphabet="`~ab\n", max_size=60))
def test_code_does_not_end_before_its_fence(text):
    opening, *lines, closing = fenced(text).split("\n")
    assert opening == closing
    assert all(not line.startswith(closing) for line in lines)
    line = inline(text)
    fence = re.match("`+", line)[0]
    assert "\n" not in line
    assert fence not in line[len(fence) : -len(fence)].replace(" ", "x") or set(text) <= set("` \n")


def test_types_are_the_hubs():
    check_types({"license": "mit", "base_model": ["a/b"], "tags": ["moe"], "language": "en"})
    for wrong in ({"license": ["mit"]}, {"base_model": [1]}, {"tags": "moe"}, {"eval_results": [{}]}):
        with pytest.raises(SourceError, match="the Hub does not take"):
            check_types(wrong)


def test_licences_of_several_bases():
    def base(**metadata):
        return Base("x", None, {}, "a/x", metadata)

    assert inherited([base(license="mit", language="en"), base(license="mit", language=["de", "en"])]) == {
        "license": "mit",
        "language": ["en", "de"],
    }
    assert inherited([base(license="mit"), base(license="apache-2.0")])["license"] == "other"
    assert inherited([base(license="other", license_name="llama3")]) == {"license": "other", "license_name": "llama3"}
    assert inherited([base(), base()]) == {}
