"""What goes to the Hub: a folder of its own, filled from a list of names. Whatever is not listed stays at home."""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files

from hf_moe import modeling
from hf_moe.convert.certificate import CERTIFICATE_NAME
from hf_moe.convert.checkpoint import INDEX_NAME, SIDE_FILES, file_sha256, open_checkpoint, read_json
from hf_moe.convert.conversion import RECIPE_NAME
from hf_moe.convert.headers import check_inside, read_header
from hf_moe.convert.manifest import MANIFEST_NAME, write_manifest
from hf_moe.errors import SourceError
from hf_moe.modeling import CONFIGS

from .leaks import check_no_secrets

CARD = "README.md"
EXPERTS = "experts.safetensors"
EXPERTS_CONFIG = "experts_config.json"
PICTURES = ("load.png", "together.png", "domains.png", "confusion*.png", "reliability*.png")
RESULTS = (CERTIFICATE_NAME, "routing.json", "metrics.json", "training.json", RECIPE_NAME, *PICTURES)
SENTENCES = ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json")
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", INDEX_NAME, "[0-9]_Dense/model.safetensors")

# Everything that may be published -> what it is. Code is not among it: it is written anew (`_write_code`).
ALLOWED: dict[str, str] = {
    "config.json": "configuration",
    EXPERTS: "weights of single experts",
    EXPERTS_CONFIG: "what they are",
    MANIFEST_NAME: "digests of all files",
    CARD: "card",
    **dict.fromkeys(WEIGHTS, "weights"),
    **dict.fromkeys(SIDE_FILES, "tokenizer, processor or licence"),
    **dict.fromkeys(RESULTS, "result"),
    **dict.fromkeys(SENTENCES, "sentence-transformers"),
}
REPORT_FILES = ("routing.json", "metrics.json", *PICTURES)
FROM_US = (CARD, MANIFEST_NAME)  # made here, never copied


@dataclass(frozen=True)
class Staged:
    """What would be sent.

    Args:
        folder: the staged folder; weights are links to the source's.
        source: the folder it was made from.
        config: its `config.json`.
        left_out: what the source has besides, by its name there.
        sha256: file -> digest, of everything.
    """

    folder: Path
    source: Path
    config: dict[str, Any]
    left_out: list[str]
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, int]:
        """Name -> bytes, by name."""
        found = (Path(root) / name for root, _, names in os.walk(self.folder) for name in names)
        return {str(file.relative_to(self.folder)): file.stat().st_size for file in sorted(found)}

    @property
    def is_artefact(self) -> bool:
        """Whether it holds single experts, and no model."""
        return (self.folder / EXPERTS_CONFIG).is_file()


def is_allowed(name: str) -> bool:
    """Whether a file of that name, relative to its folder, may be published."""
    return any(_matches(name, pattern) for pattern in ALLOWED)


def stage(source: Path, folder: Path, *, reports: Sequence[Path] = ()) -> Staged:
    """Fills `folder` with what may be published of `source`, and of the folders of `reports`.

    Raises:
        SourceError: where the source is damaged, or holds weights or code that can't be published, or a secret; where
            two reports have a file of one name.
    """
    config = read_json(source / "config.json") if source.is_dir() else None
    if config is None:
        raise SourceError(f"{source}: no such folder.")
    names = {
        name for name in _names(source) if is_allowed(name) and not any(_matches(name, one) for one in WEIGHTS[:3])
    } - {*FROM_US, "config.json"}
    for name in [*sorted(names), *_weights(source)]:
        _take(source / name, folder / name, source)
    made_here = _write_code(source, folder, config)
    for report in reports:
        _add_report(report, folder)
    staged = Staged(folder, source, config, sorted(_names(source) - made_here - set(_present(folder)) - set(FROM_US)))
    for name in staged.files:
        check_no_secrets(folder / name, shown=str(source / name))
    return staged


def digest_weights(staged: Staged) -> None:
    """Takes the digests of the weights; those that are not what the source's manifest says are refused."""
    listed = _manifest(staged.source).get("files", {})
    for name in (name for name in staged.files if name.endswith(".safetensors")):
        found = staged.sha256[name] = file_sha256(staged.folder / name)
        wanted = listed.get(name, {}).get("sha256", found)
        if wanted != found:
            raise SourceError(
                f"{staged.source / name}: is not what {MANIFEST_NAME} says: its sha256 is {found}, not {wanted}."
            )


def seal(staged: Staged) -> None:
    """Writes the manifest, and digests what has no digest yet; nothing may change in the folder after it."""
    sources = _manifest(staged.source).get("sources") or sources_of(staged.config)
    write_manifest(staged.folder, sources, staged.sha256)
    for name in staged.files.keys() - staged.sha256.keys():
        staged.sha256[name] = file_sha256(staged.folder / name)


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_NAME
    return read_json(file) if file.is_file() else {}


def sources_of(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints that a model was made from, as its configuration tells of them."""
    found = [config.get("upcycled_from"), *(config.get("fused_from") or [])]
    kept = ("source", "revision", "sha256")
    return [{name: one.get(name) for name in kept} for one in found if isinstance(one, dict) and one.get("source")]


def _matches(name: str, pattern: str) -> bool:
    return name.count("/") == pattern.count("/") and fnmatchcase(name, pattern)


def _names(folder: Path) -> set[str]:
    """Files, relative to the folder; those of folders in it as far as one level, of deeper ones the folder."""
    found = set()
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            found |= {f"{entry.name}/{inner.name}" + ("/" if inner.is_dir() else "") for inner in entry.iterdir()}
        else:
            found.add(entry.name)
    return found


def _present(folder: Path) -> list[str]:
    return [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]


def _weights(source: Path) -> list[str]:
    """The files that hold the weights, checked; no shard that no index names."""
    if (source / EXPERTS_CONFIG).is_file():
        loads = sorted(file.name for pattern in WEIGHTS[:3] for file in source.glob(pattern))
        if loads:
            raise SourceError(f"{source}: holds single experts, and {loads[0]}, which would load as a whole model.")
        for _ in read_header(source / EXPERTS, source):
            pass
        return []
    files = [file.name for file in open_checkpoint(source).files]
    return [*files, INDEX_NAME] if files != ["model.safetensors"] else files


def _take(file: Path, to: Path, source: Path) -> None:
    check_inside(file, source)
    if not file.is_file():
        raise SourceError(f"{file}: is no file.")
    to.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".safetensors":
        to.symlink_to(file.resolve())
    else:
        shutil.copyfile(file, to)


def _add_report(report: Path, folder: Path) -> None:
    names = (
        [name for name in sorted(_names(report)) if any(_matches(name, one) for one in REPORT_FILES)]
        if (report.is_dir())
        else []
    )
    if not names:
        raise SourceError(f"{report}: is no folder of a report (with routing.json or metrics.json).")
    for name in names:
        if (folder / name).exists():
            raise SourceError(f"{report / name}: another file of that name is published already.")
        _take(report / name, folder / name, report)


def _write_code(source: Path, folder: Path, config: dict[str, Any]) -> set[str]:
    """Writes `config.json` with all Auto classes, and the code that they name -> names of what was written."""
    family = next((one for one in CONFIGS.values() if one.model_type == config.get("model_type")), None)
    if family is not None:
        auto_map = {auto: f"{family.modeling_module}.{name}" for auto, name in family.auto_classes.items()}
        config["auto_map"] = {**auto_map, "AutoConfig": f"{family.modeling_module}.{family.__name__}"}
        family.save_code(folder)
    elif config.get("auto_map"):
        for file in _code_of(source, config):
            shutil.copyfile(file, folder / file.name)
    text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return {"config.json", *(file.name for file in folder.glob("*.py"))}


def _code_of(source: Path, config: dict[str, Any]) -> list[Path]:
    """The files that `auto_map` names and what they import, from where hf_moe has them; other code is not ours to
    send, nor to run."""
    home = Path(str(modeling.__file__)).parent
    found: set[Path] = set()
    for reference in config["auto_map"].values():
        file = home / f"{str(reference).partition('.')[0]}.py"
        if not file.is_file():
            raise SourceError(f"{source}: config.json loads {file.name}, which is no code of hf_moe.")
        found |= {file, *map(Path, get_relative_import_files(file))}
    return sorted(found)
