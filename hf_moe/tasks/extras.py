"""Libraries that not every user has: asked for by name before they are needed."""

from importlib import util

from hf_moe.errors import UsageError


def need(extra: str, *modules: str) -> None:
    """Raises UsageError where one of `modules` is not installed, naming the extra that brings it."""
    missing = [name for name in modules if util.find_spec(name) is None]
    if missing:
        raise UsageError(f"This needs {' and '.join(missing)}; pip install 'hf_moe[{extra}]'.")
