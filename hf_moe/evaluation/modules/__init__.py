"""Metrics of our own for the `evaluate` library: `evaluate.load(module_path("entities"))`, which needs no network."""

from pathlib import Path

from hf_moe.errors import UsageError

NAMES = ("calibration", "entities", "perplexity")


def module_path(name: str) -> str:
    """Where `evaluate.load` finds one of `NAMES`; UsageError for another name."""
    if name not in NAMES:
        raise UsageError(f"metric {name!r} is not known; choose from {', '.join(NAMES)}.")
    return str(Path(__file__).with_name(f"{name}.py"))
