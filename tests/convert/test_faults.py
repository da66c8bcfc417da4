"""Whatever breaks, and whenever: the output is the old one whole, the new one whole, or nothing."""

import hashlib
import shutil
from pathlib import Path

import pytest

import hf_moe
from hf_moe.convert import conversion, open_checkpoint, writer
from hf_moe.recipe import UpcycleRecipe
from tests.convert.faults import KILLED, Injector, run_forked

OPTIONS = {"num_experts": 4, "max_shard_size": "300KB"}


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
            run_forked(self.run, Injector(count // 2, "kill"))
            assert not self.output.exists()
            assert list((self.output.parent / "moe.partial" / "files").glob("model-*"))
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
            assert found == self.old or how == "EIO", where
        code, text, _ = run_forked(self.run, Injector(0, "kill"))
        assert code == 0, f"{where}, and again: {text}"
        assert snapshot(self.output) == self.new, where
        assert [path.name for path in self.output.parent.iterdir()] == ["moe"], where


@pytest.mark.parametrize("name", ["fresh", "overwrite", "resume"])
@pytest.mark.parametrize("how", ["kill", "half", "ENOSPC", "EIO"])
def test_broken_at_every_operation(name, how, dense_folder, tmp_path, monkeypatch):
    scene = Scene(name, dense_folder("bert"), tmp_path, monkeypatch)
    count = scene.operations()
    assert count > 40
    for at in range(1, count + 1):
        scene.broken_at(at, how)
