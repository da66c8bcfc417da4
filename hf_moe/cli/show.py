"""Printing: one sink for people and for programs."""

import json
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from hf_moe.convert import Progress as Listener
from hf_moe.convert.certificate import explain

OUT = Console(soft_wrap=True, highlight=False, markup=False)
ERR = Console(stderr=True)


def fields(values: dict[str, Any], as_json: bool) -> None:
    """A mapping, as JSON or as two columns."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table.grid("name", Column("value", overflow="fold"), padding=(0, 2))
    for name, value in values.items():
        if value not in (None, [], {}):
            table.add_row(name.replace("_", " "), Text(_text(name, value)))
    OUT.print(table)


def _text(name: str, value: Any) -> str:
    if name == "bytes":
        return f"{value:,} ({value / 1e6:,.1f} MB)"
    if name == "dropped":
        named: dict[str, list[str]] = {}
        for tensor, why in value.items():
            named.setdefault(why, []).append(tensor)
        more = {why: f" and {len(tensors) - 1} more" if tensors[1:] else "" for why, tensors in named.items()}
        return "\n".join(f"{tensors[0]}{more[why]}: {why}" for why, tensors in named.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_text(key, inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ("\n" if any(isinstance(item, str) and " " in item for item in value) else ", ").join(map(str, value))
    return str(value)


def upcycled(values: dict[str, Any], certificate: dict[str, Any] | None, as_json: bool) -> None:
    """What a conversion made."""
    if as_json:
        print(json.dumps(values | {"certificate": certificate}, indent=2))
        return
    fields(values, as_json=False)
    if certificate is not None:
        verdict(certificate)


def certificate(values: dict[str, Any], as_json: bool) -> None:
    """A certificate: its measurements and the verdict."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table("dtype", "inputs", "output", "max abs", "max rel", "allowed", box=None, pad_edge=False)
    for dtype in ("float32", "float64"):
        run = values[dtype]
        for inputs in ("text", "random"):
            for output, difference in run.get(inputs, {}).get("outputs", {}).items():
                numbers = (difference["max_abs"], difference["max_rel"], run["tolerance"])
                table.add_row(dtype, inputs, output, *(f"{number:.1e}" for number in numbers))
    OUT.print(table)
    verdict(values)


def verdict(values: dict[str, Any]) -> None:
    """The last line of a certificate."""
    word, style = ("the same function", "green") if values["passed"] else ("not the same function", "red")
    OUT.print(Text.assemble((word, style), f": {explain(values)}"))


class Bars(Listener):
    """Progress bars on standard error, which leave nothing behind and appear on a terminal only."""

    def __init__(self, enabled: bool):
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=ERR, transient=True, disable=not (enabled and ERR.is_terminal))
        self.task = self.progress.add_task("starting", total=None)

    def __enter__(self) -> "Bars":
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def stage(self, name: str) -> None:
        self.progress.reset(self.task, description=name, total=None)

    def total(self, nbytes: int) -> None:
        self.progress.update(self.task, total=nbytes)

    def wrote(self, nbytes: int) -> None:
        self.progress.advance(self.task, nbytes)
