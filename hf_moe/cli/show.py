"""Printing: one sink for people and for programs."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from hf_moe.convert import Progress as Listener
from hf_moe.convert import Reduced
from hf_moe.convert.certificate import explain
from hf_moe.convert.observe import Observed
from hf_moe.hub import Published

OUT = Console(soft_wrap=True, highlight=False, markup=False)
ERR = Console(stderr=True)


def fields(values: dict[str, Any], as_json: bool, *, words: bool = True) -> None:
    """A mapping, as JSON or as two columns; whether its keys are `words` to read, or names that stay as they are."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table.grid("name", Column("value", overflow="fold"), padding=(0, 2))
    for name, value in values.items():
        if value not in (None, [], {}):
            table.add_row(name.replace("_", " ") if words else name, Text(_text(name, value)))
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
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "\n".join(_text(name, item) for item in value)
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


def reduced(made: Reduced, as_json: bool) -> None:
    """What a reduction made; per layer only as JSON, and in the file beside the weights."""
    if as_json:
        print(json.dumps(made.report | {"output": str(made.path), "certificate": made.certificate}, indent=2))
        return
    left_out = ("format", "source", "groups", "scales", "scores", "taken", "versions")
    told = {name: value for name, value in made.report.items() if name not in left_out}
    fields(told | {"routing": list(_routing(told.get("routing", {})))}, as_json=False)
    if made.certificate is not None:
        verdict(made.certificate)


def observed(made: Observed, as_json: bool) -> None:
    """How a mixture routes: balance by layer, what to do, and where the page lies."""
    if as_json:
        print(json.dumps(made.report | {"output": str(made.path)}, indent=2))
        return
    names = ("layer", "max_violation", "cv", "normalised_entropy", "similarity")
    table = Table(*(name.replace("_", " ") for name in names), "dead", box=None, pad_edge=False)
    for layer in made.report["layers"]:
        numbers = ("–" if layer[name] is None else f"{layer[name]:.3f}" for name in names[1:])
        table.add_row(str(layer["layer"]), *numbers, str(len(layer["dead_experts"])))
    OUT.print(table)
    for sentence in made.report["advice"]:
        OUT.print(f"- {sentence}")
    OUT.print(f"{made.path / 'report.html'}")


def evaluated(report: dict[str, Any], path: Path | None, as_json: bool) -> None:
    """A row a model, and how each differs from the first."""
    if as_json:
        print(json.dumps(report | {"output": None if path is None else str(path)}, indent=2))
        return
    if models := report.get("models"):
        OUT.print(_metrics_table({model["name"]: model["metrics"] for model in models}))
        for entry in report["comparisons"]:
            OUT.print(_comparison(entry))
        for note in report["notes"]:
            OUT.print(f"- {note}")
    for model, tasks in report.get("lm_eval", {}).items():
        for task, figures in tasks.items():
            shown = {name: value for name, value in figures.items() if isinstance(value, float)}
            OUT.print(f"{model}, {task}: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
    if path is not None:
        OUT.print(f"{path}")


def cross_validated(report: dict[str, Any], path: Path, as_json: bool) -> None:
    """Each figure over the folds."""
    if as_json:
        print(json.dumps(report | {"output": str(path)}, indent=2))
        return
    columns = ("mean", "sd", *(f"fold {fold['fold']}" for fold in report["folds"]))
    table = Table("", *(Column(name, justify="right") for name in columns), box=None, pad_edge=False)
    for name, over in report["summary"].items():
        cells = [over["mean"], over["sd"], *(fold["metrics"][name] for fold in report["folds"])]
        table.add_row(name.replace("_", " "), *("–" if cell is None else f"{cell:,.4f}" for cell in cells))
    OUT.print(table)
    for note in report["notes"]:
        OUT.print(f"- {note}")
    OUT.print(f"{path}")


def _metrics_table(models: dict[str, dict[str, float | None]]) -> Table:
    """A row a figure, a column a model: there are more figures than models."""
    table = Table("", *(Column(Text(name), justify="right") for name in models), box=None, pad_edge=False)
    for name in next(iter(models.values())):
        cells = [metrics.get(name) for metrics in models.values()]
        table.add_row(name.replace("_", " "), *("–" if cell is None else f"{cell:,.4f}" for cell in cells))
    return table


def _comparison(entry: dict[str, Any]) -> str:
    start = f"{entry['model']} against {entry['against']}, {entry['metric']}: "
    if "note" in entry:
        return start + entry["note"]
    low, high = entry["interval"]
    return (
        f"{start}{entry['difference']:+.4f} (95% {low:+.4f} to {high:+.4f}), better in "
        f"{entry['share_better']:.1%} of {entry['resamples']} resamples"
    )


def fused(values: dict[str, Any], routing: dict[str, Any], certificate: dict[str, Any] | None, as_json: bool) -> None:
    """What a fusion made."""
    shown = routing if as_json else list(_routing(routing))
    upcycled(values | {"routing": shown}, certificate, as_json)


def _routing(routing: dict[str, Any]) -> Iterator[str]:
    for entry in routing.get("layers", []):
        if entry["held_out_texts"] is not None:
            texts, tokens, chance = (
                f"{share:.0%}" for share in (entry["held_out_texts"], entry["held_out_tokens"], entry["chance"])
            )
            yield (
                f"layer {entry['layer']}: {texts} of held-out texts go to their expert, {tokens} of their tokens "
                + (f"(by chance {chance})")
            )
    if training := routing.get("training"):
        yield "{steps} steps of training: loss {first_loss:.3f} to {last_loss:.3f}".format(**training)


def planned(told: dict[str, Any], as_json: bool) -> None:
    """What a training run would do; its recipe in YAML, so that it can be kept."""
    if as_json:
        print(json.dumps(told, indent=2))
        return
    OUT.print(yaml.safe_dump(told["recipe"], sort_keys=False, allow_unicode=True).rstrip())
    fields(_trains(told["trains"]) if "trains" in told else {}, as_json=False)
    fields({name: value for name, value in told.items() if name in ("data", "upcycle")}, as_json=False)


def trained(report: dict[str, Any], path: Path, as_json: bool) -> None:
    """What a training run made; its history only as JSON, and in the file beside the weights."""
    if as_json:
        print(json.dumps(report | {"output": str(path)}, indent=2))
        return
    names = ("task", "class", "steps", "tokens", "active_flops", "best")
    figures = {name: value for name, value in report["metrics"].items() if not name.endswith(SPEEDS)}
    told = {name: report[name] for name in names} | _trains(report["trains"]) | {"metrics": figures}
    fields(told | {"output": str(path)}, as_json=False)


SPEEDS = ("_runtime", "_per_second", "_preparation_time", "total_flos")


def _trains(trains: dict[str, Any]) -> dict[str, str | None]:
    from hf_moe.training.freezing import in_words  # heavy, and there already

    new = trains["new"]
    return {
        "trains": in_words(trains),
        "new": f"{', '.join(new[:4])}{f' and {len(new) - 4} more' if new[4:] else ''}" if new else None,
    }


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
    word = "the same function" if values.get("judged", True) else "as the recipe says"
    word, style = (word, "green") if values["passed"] else (f"not {word}", "red")
    OUT.print(Text.assemble((word, style), f": {explain(values)}"))


def published(made: Published) -> None:
    """What was sent, or would be, and what stays at home."""
    table = Table("file", Column("bytes", justify="right"), box=None, pad_edge=False)
    for name, nbytes in made.files.items():
        table.add_row(Text(name), f"{nbytes:,}")
    OUT.print(table)
    for label, names in (("not published", made.left_out), ("taken away", made.removed)):
        if names:
            OUT.print(f"{label}: {', '.join(names)}")
    if made.url is None:
        OUT.print(f"{len(made.files)} files would be sent to {made.repo_id}; nothing was")
        return
    OUT.print(f"the same {made.compared:,} values of the outputs in a clean process")
    OUT.print(made.pull_request or made.url if made.changed else f"{made.repo_id} has it already: {made.url}")


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
