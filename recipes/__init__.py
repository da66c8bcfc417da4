"""Recipes that run as they stand: `hf-moe train NAME`. Imported as `hf_moe.recipes`."""

import re
from pathlib import Path


def files() -> list[Path]:
    """Those that train, by name: they name a task."""
    found = sorted(Path(__file__).parent.glob("*.yaml"))
    return [file for file in found if re.search("^task:", file.read_text(encoding="utf-8"), re.MULTILINE)]


def launchers() -> list[Path]:
    """The configurations of Accelerate, by name."""
    return sorted((Path(__file__).parent / "accelerate").glob("*.yaml"))
