"""The manifest: the sha256 of every file of a checkpoint, and of what it was made from."""

import json
from pathlib import Path
from typing import Any

from .checkpoint import file_sha256, read_json

MANIFEST_NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, sources: list[dict[str, Any]], known: dict[str, str]) -> None:
    """Writes `manifest.json`; `known` are digests that need not be taken again."""
    files = {file.name: _entry(file, known.get(file.name)) for file in sorted(folder.iterdir()) if _counts(file)}
    _write(folder, {"format": FORMAT, "sources": sources, "files": files})


def update_manifest(folder: Path, file: Path) -> None:
    """Notes that `file` was written anew; does nothing where there is no manifest."""
    if (folder / MANIFEST_NAME).is_file():
        manifest = read_json(folder / MANIFEST_NAME)
        manifest["files"] = dict(sorted({**manifest["files"], file.name: _entry(file)}.items()))
        _write(folder, manifest)


def _counts(file: Path) -> bool:
    return file.is_file() and file.name != MANIFEST_NAME


def _entry(file: Path, sha256: str | None = None) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": sha256 or file_sha256(file)}


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    temporary = folder / f".{MANIFEST_NAME}"
    temporary.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    temporary.replace(folder / MANIFEST_NAME)
