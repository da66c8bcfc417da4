"""The documents: every command and every piece of Python in them runs, in the order they stand."""

import ast
import importlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

from hf_moe.cli import main
from tests.conftest import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(bash|python|yaml|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: file.name)
def test_what_the_documents_say_runs(document, dense_folder, tmp_path, monkeypatch):
    for family in FAMILIES:
        shutil.copytree(dense_folder(family), tmp_path / family)
    for tuned in ("bert-pets", "bert-law"):
        shutil.copytree(dense_folder("bert"), tmp_path / tuned)
    monkeypatch.chdir(tmp_path)
    for language, text in BLOCK.findall(document.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, document.name, "exec"), {"__name__": "document"})
        elif language == "yaml":
            Path(text.partition("\n")[0].removeprefix("# ")).write_text(text)
        elif language == "text":
            name, _, rest = text.partition("\n")
            Path(name.removeprefix("# ")).write_text(rest)
        else:
            for command in text.splitlines():
                run(shlex.split(command), monkeypatch)


def run(command, monkeypatch):
    if command[0] == "make":  # CI runs `make test`, and tests/models the demo; here it only has to be there
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert command[0] == "hf-moe"
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_:
        main()
    assert not exit_.value.code, command


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda file: file.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
        if not link.startswith("http"):
            assert (document.parent / link).exists(), link


def test_the_families_of_the_documents_are_those_of_the_code():
    from hf_moe.convert import FAMILIES

    usage = (ROOT / "docs" / "usage.md").read_text()
    listed = re.findall(r"^\| .+ \| `([\w-]+)` \| all that Transformers has", usage, re.MULTILINE)
    assert sorted(listed) == sorted(FAMILIES)


def test_the_example_of_a_family_is_the_code():
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    files = [ROOT / file for file in re.findall(r"\]\(((?:hf_moe|convert)/\S+\.py)\)", contributing)]
    held = [line.partition("  #")[0] for file in files for line in file.read_text().splitlines()]
    [_, example, *_] = re.split(r"```(?:python)?\n", contributing)
    assert len(files) == 3
    assert [line for line in example.splitlines() if line not in held] == []
    statements = sum(count_statement_lines(file.read_text()) for file in files)
    assert f"{statements} lines of statements" in contributing
    assert statements < 80


def count_statement_lines(source: str) -> int:
    """Lines that are neither blank nor an import, a module's docstring or `__all__`."""
    lines = set(range(1, len(source.splitlines()) + 1))
    for node in ast.parse(source).body:
        names = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
        docstring = isinstance(node, ast.Expr)
        if names or docstring or isinstance(node, ast.Import | ast.ImportFrom):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return sum(bool(source.splitlines()[line - 1].strip()) for line in lines)


def test_the_speeds_of_experts_are_those_measured():
    """Rows: a shape, then ours and the fastest of Transformers' own as fractions of the dense layer's speed."""
    usage = (ROOT / "docs" / "usage.md").read_text()
    [measured] = json.loads((ROOT / "benchmarks" / "experts_speed.json").read_text()).values()
    columns = [f"{dtype} T=2048 {mode}" for dtype in ("float32", "bfloat16") for mode in ("forward", "training")]
    columns += ["float32 T=1 forward", "bfloat16 T=1 forward"]
    for shape in ("MiniLM", "BERT-base", "GPT-2", "SmolLM", "granular"):
        cells = []
        for column in columns:
            times = dict(measured[f"{shape} {column}"])
            dense, ours = times.pop("dense"), times.pop("sorted_mm")
            cells.append(f"{dense / ours:.2f} ({dense / min(times.values()):.2f})")
        assert re.search(rf"^\| {shape} \(.*\) \| {re.escape(' | '.join(cells))} \|$", usage, re.MULTILINE), shape


def test_the_speeds_of_models_are_those_measured():
    usage = (ROOT / "docs" / "usage.md").read_text()
    for family, models in json.loads((ROOT / "benchmarks" / "end_to_end.json").read_text()).items():
        for who, found in models.items():
            decoding = f"{found['decoding']:.1f}" if "decoding" in found else ""
            size, forward, training = (found[name] for name in ("parameters", "forward", "training_step"))
            cells = f"{size / 1e6:.0f} M | {forward:.0f} | {training:.0f} | {decoding}"
            name = {"bert": "BERT-base", "gpt2": "GPT-2"}[family]
            assert f"| {name}, {who} | {cells} |" in usage


def test_the_speeds_of_the_readme_are_those_measured():
    """Rows: what, then one cell a shape; each figure as the benchmark wrote it."""
    readme = (ROOT / "README.md").read_text()
    measured = json.loads((ROOT / "benchmarks" / "convert_speed.json").read_text())
    rows = {
        "`cat` of the result into one file, synced": ("limit", "seconds", ".1f"),
        "`dd` of it, past the page cache": ("limit, direct", "seconds", ".1f"),
        "hf_moe": ("hf_moe", "inside", ".1f"),
        "hf_moe, with the sha256 of every file": ("hf_moe, with manifest", "inside", ".1f"),
        "hf_moe, the whole process": ("hf_moe", "seconds", ".1f"),
        "mergekit-moe 0.1.5, the whole process": ("mergekit-moe", "seconds", ".1f"),
        "peak memory of hf_moe, MB": ("hf_moe, with manifest", "peak_mb", ".0f"),
        "peak memory of mergekit-moe, MB": ("mergekit-moe", "peak_mb", ",.0f"),
    }
    for label, (who, what, form) in rows.items():
        cells = [format(found[who][what], form) if who in found else "" for found in measured.values()]
        assert f"| {label} | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |") in readme, label


def test_the_claims_are_those_measured(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    claims = importlib.import_module("claims")
    document = (ROOT / "docs" / "claims.md").read_text()
    for experiment in claims.EXPERIMENTS:
        assert "\n".join(claims.markdown(experiment)) in document, experiment
    found = claims.results("domains")
    for arm in ("top-1 of 8", "default", "dense, as many FLOPs"):
        less = claims.differences(claims.beside_dense(found, arm), "eval_loss")
        assert f"{-sum(less) / len(less):.3f}" in (ROOT / "README.md").read_text(), arm
