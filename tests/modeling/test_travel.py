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
from tests.conftest import FAMILIES, assert_equal, batch, tiny_moe
from tests.families import TESTED

LOAD = """
import importlib.util, sys, torch, transformers
assert importlib.util.find_spec("hf_moe") is None, "this process must not know hf_moe"
folder, auto, resaved, outputs = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
inputs = torch.load(outputs + ".inputs")
with torch.no_grad():
    torch.save(model(**inputs, output_router_logits=True).to_tuple(), outputs)
model.save_pretrained(resaved)
assert type(model.config) is type(model).config_class, "the configuration class exists twice"
assert model.config._experts_implementation == "sorted_mm"
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


def run_stranger(python, *arguments, cache):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(cache), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cache / "modules")}
    done = subprocess.run(
        [python, "-c", LOAD, *map(str, arguments)], env=environment, cwd=cache, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.multiprocess
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_and_saves_itself_without_hf_moe(family, stranger, tmp_path):
    model = tiny_moe(family)
    model.save_pretrained(tmp_path / "first")
    inputs = batch(family)
    loaded = type(model).from_pretrained(tmp_path / "first")  # weights lie in memory as they will for the stranger
    expected = loaded.eval()(**inputs, output_router_logits=True).to_tuple()
    auto = TESTED[family].lm
    outputs = tmp_path / "outputs.pt"
    torch.save(inputs, f"{outputs}.inputs")

    for source, resaved in (("first", "second"), ("second", "third")):
        cache = tmp_path / f"cache-{source}"
        cache.mkdir()
        run_stranger(stranger, tmp_path / source, auto, tmp_path / resaved, outputs, cache=cache)
        assert_equal(torch.load(outputs, weights_only=False), expected)
    first, third = tmp_path / "first", tmp_path / "third"
    assert {file.name for file in first.iterdir()} == {file.name for file in third.iterdir()}
    for file in first.glob("*.py"):
        assert file.read_bytes() == (third / file.name).read_bytes()
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, third)]
    assert configs[0]["auto_map"] == configs[1]["auto_map"]
    assert type(model).from_pretrained(third).config.num_experts == 4


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
