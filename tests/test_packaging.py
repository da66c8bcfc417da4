"""The wheel: what is in it, and that it works where the source is not."""

import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PARTS = ("hf_moe", "convert", "recipes", "model_cards", "pyproject.toml", "README.md", "LICENSE")


def run(*command, cwd):
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, folder / part)
    run(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "dist", cwd=folder)
    [file] = (folder / "dist").glob("*.whl")
    return file


@pytest.mark.multiprocess
def test_the_wheel_holds_everything_under_one_name(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"hf_moe"}
    expected = {"hf_moe/py.typed", "hf_moe/convert/sample.txt", "hf_moe/convert/families/bert.py"}
    expected |= {f"hf_moe/routing/page.{ending}" for ending in ("css", "html.j2", "js")}
    assert expected <= names
    expected |= {f"hf_moe/model_cards/{file.name}" for file in (ROOT / "model_cards").glob("*.md.j2")}
    source = {f"hf_moe/{file.relative_to(ROOT / 'hf_moe')}" for file in (ROOT / "hf_moe").rglob("*.py")}
    source |= {f"hf_moe/convert/{file.relative_to(ROOT / 'convert')}" for file in (ROOT / "convert").rglob("*.py")}
    assert source <= names


@pytest.mark.multiprocess
def test_the_wheel_converts_in_a_fresh_environment(wheel, dense_folder, tmp_path):
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=True)
    [site] = environment.glob("lib/python*/site-packages")
    # our dependencies, as a plain path: an editable install of hf_moe does not come along
    (site / "dependencies.pth").write_text(str(Path(torch.__file__).parents[1]))
    run(environment / "bin" / "pip", "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    command = environment / "bin" / "hf-moe"
    assert "upcycle" in run(command, "--help", cwd=tmp_path)
    out = run(command, "upcycle", dense_folder("bert"), "moe", "--num-experts", 4, cwd=tmp_path)
    assert "the same function" in out
    where = run(environment / "bin" / "python", "-c", "import hf_moe.convert as c; print(c.__file__)", cwd=tmp_path)
    assert where.startswith(str(environment))
