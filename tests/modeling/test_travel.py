"""A checkpoint travels: it loads where hf_moe has never been, and saves itself whole from there."""

import ast
import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

import hf_moe.modeling
from hf_moe.modeling import CONFIGS, model_class
from tests.conftest import FAMILIES, assert_equal, batch, lm_class, tiny_moe
from tests.families import TESTED

# Loads and saves again every folder of the JSON in its argument; what fails is written down, and the next one's turn.
LOAD = """
import importlib.util, json, pathlib, sys, torch, traceback, transformers
assert importlib.util.find_spec("hf_moe") is None, "this process must not know hf_moe"

def load(source, auto, resaved, inputs, outputs):
    model = getattr(transformers, auto).from_pretrained(source, trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(inputs), output_router_logits=True).to_tuple(), outputs)
    model.save_pretrained(resaved)
    assert type(model.config) is type(model).config_class, "the configuration class exists twice"
    assert model.config._experts_implementation == "sorted_mm"

for job in json.loads(sys.argv[1]):
    try:
        load(**job)
    except Exception:
        pathlib.Path(job["outputs"] + ".error").write_text(traceback.format_exc())
"""


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A Python that has our dependencies, and neither hf_moe nor its source."""
    folder = tmp_path_factory.mktemp("stranger")
    venv.create(folder / "venv", symlinks=True)
    [site] = (folder / "venv").glob("lib/python*/site-packages")
    # a plain path entry: the packages of this environment without its own .pth files, so no editable install
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    return folder / "venv" / "bin" / "python"


def run_stranger(python, jobs, cache):
    cache.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache / "modules")}
    command = [python, "-c", LOAD, json.dumps(jobs, default=str)]
    done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def travelled(stranger, tmp_path_factory):
    """A folder for each family: `first` as we save it; `second`, which a stranger saved who had loaded that, and
    `third`, saved by one who had loaded the second, with the outputs of both."""
    folder = tmp_path_factory.mktemp("travelled")
    for family in FAMILIES:
        tiny_moe(family).save_pretrained(folder / family / "first")
        torch.save(batch(family), folder / family / "inputs.pt")
    for source, resaved in (("first", "second"), ("second", "third")):
        jobs = [
            {
                "source": folder / family / source,
                "auto": TESTED[family].lm,
                "resaved": folder / family / resaved,
                "inputs": folder / family / "inputs.pt",
                "outputs": folder / family / f"of-{source}.pt",
            }
            for family in FAMILIES
        ]
        run_stranger(stranger, jobs, folder / f"cache-{source}")
    return folder


@pytest.mark.multiprocess
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_saves_itself_without_hf_moe(family, travelled):
    folder = travelled / family
    errors = [file.read_text() for file in sorted(folder.glob("*.error"))]
    assert not errors, errors[0]
    loaded = model_class(CONFIGS[family], lm_class(family)).from_pretrained(folder / "first").eval()
    expected = loaded(**torch.load(folder / "inputs.pt"), output_router_logits=True).to_tuple()
    for source in ("first", "second"):
        assert_equal(torch.load(folder / f"of-{source}.pt", weights_only=False), expected)
    first, third = folder / "first", folder / "third"
    assert {file.name for file in first.iterdir()} == {file.name for file in third.iterdir()}
    for file in first.glob("*.py"):
        assert file.read_bytes() == (third / file.name).read_bytes()
    configs = [json.loads((saved / "config.json").read_text()) for saved in (first, third)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert type(loaded).from_pretrained(third).config.num_experts == 4


HOME = Path(hf_moe.modeling.__file__).parent
TRAVELLERS = [*sorted(HOME.glob("*_moe.py")), *sorted(HOME.glob("moe_*.py"))]


@pytest.mark.parametrize("file", TRAVELLERS, ids=lambda file: file.name)
def test_travelling_files_import_only_torch_transformers_and_siblings(file):
    siblings = {traveller.stem for traveller in TRAVELLERS}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            tops = {alias.name.partition(".")[0] for alias in node.names}
            assert tops <= {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, "the code copier of Transformers follows `from .name import X` only"
            assert node.module in siblings
        elif isinstance(node, ast.ImportFrom):
            assert node.module.partition(".")[0] in {
                "torch",
                "transformers",
                "huggingface_hub",  # where Transformers takes `strict` from; it always comes with it
                *sys.stdlib_module_names,
            }
