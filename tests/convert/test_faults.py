"""Whatever breaks, and whenever: the output is the old one whole, the new one whole, or nothing."""

import hashlib
import os
import shutil
from pathlib import Path

import pytest

import hf_moe
from hf_moe.convert import conversion, open_checkpoint, output, writer
from hf_moe.convert.output import whole_folder
from hf_moe.errors import SourceError, UsageError
from hf_moe.recipe import UpcycleRecipe
from tests.convert.faults import KILLED, Injector, run_forked

OPTIONS = {"num_experts": 4, "max_shard_size": "150KB"}


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


class Scene:
    """A conversion of one tiny checkpoint, over nothing, over an old output, or after an interrupted run."""

    def __init__(self, name: str, dense: Path, folder: Path, monkeypatch):
        monkeypatch.setattr(writer, "BLOCK", 2**16)
        monkeypatch.setattr(writer, "MARK_BYTES", 2**17)
        self.name, self.dense, self.output = name, dense, folder / "work" / "moe"
        self.new = snapshot(hf_moe.upcycle(dense, folder / "new", verify=False, **OPTIONS).path)
        self.old: dict[str, str] = {}
        self.start = folder / "start"
        self.start.mkdir()
        if name == "overwrite":
            hf_moe.upcycle(dense, self.start / "moe", verify=False, **{**OPTIONS, "num_experts": 3})
            self.old = snapshot(self.start / "moe")
        # planning is not what is tested, and always the same
        recipe = UpcycleRecipe.from_dict({"base_model": str(dense), **OPTIONS})
        plan = conversion.plan_upcycle(open_checkpoint(dense), recipe)
        monkeypatch.setattr(conversion, "plan_upcycle", lambda *arguments: plan)
        if name == "resume":
            count = self.operations()
            self.reset()
            run_forked(self.run, Injector(count // 3, "kill"))
            assert not self.output.exists()
            assert len((self.output.parent / "moe.partial" / "journal.jsonl").read_text().splitlines()) > 1
            shutil.copytree(self.output.parent, self.start, dirs_exist_ok=True)

    def reset(self) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        shutil.copytree(self.start, self.output.parent)

    def run(self) -> None:
        hf_moe.upcycle(self.dense, self.output, overwrite=True, verify=False, **OPTIONS)

    def operations(self) -> int:
        self.reset()
        code, text, count = run_forked(self.run, Injector(0, "kill"))
        assert code == 0, text
        assert snapshot(self.output) == self.new
        return count

    def broken_at(self, at: int, how: str) -> None:
        self.reset()
        code, text, _ = run_forked(self.run, Injector(at, how))
        where = f"{self.name}, {how} at operation {at}: {text}"
        found = snapshot(self.output) if self.output.exists() else {}
        assert found in (self.old, self.new), where
        if how in ("kill", "half"):
            assert code == KILLED, where
        elif code:  # an error that is not ours would be a traceback to the user
            assert text.startswith("OutputError: "), where
            assert len(text.splitlines()) == 1
        code, text, _ = run_forked(self.run, Injector(0, "kill"))
        assert code == 0, f"{where}, and again: {text}"
        assert snapshot(self.output) == self.new, where
        assert [path.name for path in self.output.parent.iterdir()] == ["moe"], where


HOWS = ["half", *(pytest.param(how, marks=pytest.mark.slow) for how in ("kill", "ENOSPC", "EIO"))]


@pytest.mark.parametrize("name", ["fresh", "overwrite", "resume"])
@pytest.mark.parametrize("how", HOWS)
def test_broken_at_every_operation(name, how, dense_folder, tmp_path, monkeypatch):
    scene = Scene(name, dense_folder("bert"), tmp_path, monkeypatch)
    count = scene.operations()
    assert count > 40
    for at in range(1, count + 1):
        scene.broken_at(at, how)


def test_a_full_disk_is_one_line_and_leaves_nothing(dense_folder, tmp_path, monkeypatch):
    scene = Scene("overwrite", dense_folder("bert"), tmp_path, monkeypatch)
    count = scene.operations()
    for at in range(2, count // 2, 5):
        scene.broken_at(at, "ENOSPC")


def test_what_was_damaged_meanwhile_is_not_taken_over(dense_folder, tmp_path, monkeypatch):
    scene = Scene("resume", dense_folder("bert"), tmp_path, monkeypatch)
    [damaged, *_] = sorted((scene.start / "moe.partial" / "files").glob("model-*"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    assert scene.operations()


def test_a_resumed_run_does_not_write_again(dense_folder, tmp_path, monkeypatch):
    scene = Scene("resume", dense_folder("bert"), tmp_path, monkeypatch)
    resumed = scene.operations()
    scene.start = tmp_path / "empty"
    scene.start.mkdir()
    assert resumed < scene.operations()


def test_the_locks_loser_exits_at_once(dense_folder, tmp_path, monkeypatch):
    scene = Scene("overwrite", dense_folder("bert"), tmp_path, monkeypatch)
    scene.reset()
    with whole_folder(scene.output, "another run", overwrite=True):
        code, text, _ = run_forked(scene.run, Injector(0, "kill"))
        assert (code, text) == (1, f"OutputError: {scene.output}: is being written by another run.")
        assert snapshot(scene.output) == scene.old


def test_a_folder_that_is_in_the_way_is_nobodys(dense_folder, tmp_path):
    (tmp_path / "moe.partial").mkdir()
    (tmp_path / "moe.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="is in the way, and was not left by an interrupted run"):
        hf_moe.upcycle(dense_folder("bert"), tmp_path / "moe")
    assert (tmp_path / "moe.partial" / "thesis.txt").read_text() == "mine"


def test_where_names_can_not_be_exchanged(dense_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "_exchange", lambda one, other: False)
    scene = Scene("overwrite", dense_folder("bert"), tmp_path, monkeypatch)
    count = scene.operations()
    for at in range(count - 12, count + 1):
        scene.reset()
        run_forked(scene.run, Injector(at, "kill"))
        found = snapshot(scene.output) if scene.output.exists() else {}
        assert found in ({}, scene.old, scene.new)
        if not found:
            assert snapshot(scene.output.parent / "moe.partial" / "old") == scene.old
        assert run_forked(scene.run, Injector(0, "kill"))[0] == 0
        assert snapshot(scene.output) == scene.new


def test_the_source_may_not_change_meanwhile(dense_folder, tmp_path, monkeypatch):
    dense = shutil.copytree(dense_folder("bert"), tmp_path / "dense")
    written = conversion.write_weights

    def touching(*arguments, **options):
        os.utime(dense / "model.safetensors")
        return written(*arguments, **options)

    monkeypatch.setattr(conversion, "write_weights", touching)
    with pytest.raises(SourceError, match="changed while they were read"):
        hf_moe.upcycle(dense, tmp_path / "moe")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
