"""`hf-moe train` and `hf-moe recipes`."""

import logging
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from hf_moe import recipes as packaged
from hf_moe.cli import show
from hf_moe.cli.options import Json, Overwrite, Quiet
from hf_moe.errors import UsageError
from hf_moe.tasks.extras import need

NUMBER = re.compile(r"[-+]?(\d|\.\d)")


def train(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe (FILE.yaml), or the name of a packaged one (hf-moe recipes).")],
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved recipe, the data and what trains; write nothing.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train a model by a recipe. Every key of it can be given as --key VALUE, in YAML, which wins."""
    from hf_moe.training import TrainRecipe, run  # heavy, and not every command's

    wanted = TrainRecipe.from_yaml(find_recipe(recipe), **overrides(ctx.args))
    tell(ctx, bars=sys.stderr.isatty() and not (quiet or json), warnings=not quiet)
    if dry_run:
        told = run.describe(wanted, overwrite=overwrite)
        if not quiet and is_main():
            show.planned(told, json)
        return
    made = run.train(wanted, overwrite=overwrite, quiet=quiet or json)
    if not quiet and is_main():
        show.trained(made.report, made.path, json)


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this one, to be kept and changed.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """List the packaged recipes, which `hf-moe train NAME` runs; those in accelerate/ are for `accelerate launch`."""
    held = {file.stem: file for file in packaged.files()}
    held |= {f"accelerate/{file.stem}": file for file in packaged.launchers()}
    if name is None:
        show.fields({name: headline(file) for name, file in held.items()}, json, words=False)
    elif name in held:
        print(held[name].read_text(encoding="utf-8"), end="")
    else:
        raise UsageError(f"recipe {name!r}: is no packaged recipe; choose from {', '.join(held)}.")


def find_recipe(name: str) -> Path:
    """The file of that name, or the packaged recipe.

    Raises:
        UsageError: where there is neither.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return Path(name).expanduser()
    held = {file.stem: file for file in packaged.files()}
    if name not in held:
        raise UsageError(f"recipe {name!r}: is neither a .yaml file nor a packaged recipe ({', '.join(held)}).")
    return held[name]


def headline(file: Path) -> str:
    """What the first line of a recipe says."""
    return file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def overrides(arguments: list[str]) -> dict[str, Any]:
    """`--key value` and `--key=value`, typed as YAML; dashes in a key stand for underscores; `--key` alone is true.

    Raises:
        UsageError: where something else stands there, or a key twice.
    """
    made: dict[str, Any] = {}
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or not word.strip("-"):
            raise UsageError(f"{word!r}: should be --key VALUE.")
        key, equals, text = word[2:].partition("=")
        key = key.replace("-", "_")
        if not equals:
            text = left.pop(0) if left and is_value(left[0]) else "true"
        if key in made:
            raise UsageError(f"--{key} is given twice.")
        made[key] = typed(key, text)
    return made


def is_value(word: str) -> bool:
    return not word.startswith("-") or bool(NUMBER.match(word))


def typed(key: str, text: str) -> Any:
    """Raises UsageError where `text` is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"--{key} {text}: can't be read as YAML ({' '.join(str(error).split())}).") from error


def tell(ctx: typer.Context, *, bars: bool, warnings: bool) -> None:
    """What libraries and we say on standard error meanwhile. Raises UsageError where the extra is not installed."""
    need("train", "datasets")
    import datasets

    if not bars:
        datasets.disable_progress_bars()
        disable_progress_bar()
    if not warnings:
        set_verbosity_error()
        ours = logging.getLogger("hf_moe")
        ours.setLevel(logging.ERROR)
        ctx.call_on_close(lambda: ours.setLevel(logging.NOTSET))


def is_main() -> bool:
    """Whether this process tells what was made; launchers number them."""
    return os.environ.get("RANK", "0") == "0"
