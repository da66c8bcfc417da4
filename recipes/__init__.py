"""Recipes that run as they stand: `hf-moe upcycle --recipe FILE`. Imported as `hf_moe.recipes`."""

from pathlib import Path


def files() -> list[Path]:
    """Those that train, by name."""
    return sorted(Path(__file__).parent.glob("*.yaml"))
