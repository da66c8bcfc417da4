"""`hf-moe cv`."""

from typing import Annotated

import typer

from hf_moe.cli import show
from hf_moe.cli.options import Json, Overwrite, Quiet
from hf_moe.cli.train import find_recipe, is_main, overrides, tell


def cv(
    ctx: typer.Context,
    recipe: Annotated[str, typer.Argument(help="Recipe (FILE.yaml), or the name of a packaged one (hf-moe recipes).")],
    folds: Annotated[int, typer.Option(help="Into how many parts the training rows are split.")] = 5,
    group_col: Annotated[
        str | None, typer.Option(help="Column: rows with the same value stay together. Rows of one text always do.")
    ] = None,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Keep each fold's model.")] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Cross-validate a training recipe: every row is predicted by a model that has not seen it, nor its group."""
    from hf_moe.training import TrainRecipe, run
    from hf_moe.training.cross_validation import cross_validate

    wanted = TrainRecipe.from_yaml(find_recipe(recipe), **overrides(ctx.args))
    tell(ctx, bars=False, warnings=not quiet)
    made = cross_validate(
        wanted,
        folds=folds,
        group_column=group_col,
        keep_models=keep_models,
        overwrite=overwrite,
        run=lambda one: run.train(one, quiet=quiet or json),
        progress=lambda stage: None if quiet or json or not is_main() else show.ERR.print(stage),
    )
    if not quiet and is_main():
        show.cross_validated(made.report, made.path, json)
