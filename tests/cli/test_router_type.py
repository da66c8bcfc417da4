"""`--router-type`: one line and the right exit code for what can't be."""

import json
import sys

import pytest

from hf_moe.cli import main


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["hf-moe", "upcycle", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    return exit_.value.code


def test_the_plan_says_what_the_kind_preserves(dense_folder, tmp_path, monkeypatch, capsys):
    starts = {}
    for kind in ("top_p", "expert_choice"):
        arguments = (dense_folder("bert"), tmp_path / "moe", "--router-type", kind, "--dry-run", "--json")
        assert not run(monkeypatch, *arguments)
        starts[kind] = json.loads(capsys.readouterr().out)["exactness"]
    assert starts["top_p"] == "exact"
    assert starts["expert_choice"].startswith("not preserving: experts choose tokens")


@pytest.mark.parametrize(("kind", "words"), [("toppp", "did you mean 'top_p'?"), ("expert_choice", "leak the future")])
def test_impossible_kinds_are_one_line(kind, words, dense_folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, dense_folder("gpt2"), tmp_path / "moe", "--router-type", kind) == 2
    error = capsys.readouterr().err
    assert words in " ".join(error.split())
    assert "Traceback" not in error
    assert not (tmp_path / "moe").exists()
