"""Cross-validation that leaks nothing: a fold is seen when its model is done, and not before.

Each fold's training rows become files of their own. Whatever is fitted is fitted to these: the labels that there are,
packing, the model, and the choice of the best checkpoint, by validation rows that are cut from them once more. Rows of
the same text, or the same group, are on one side of every cut.
"""

import dataclasses
import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from hf_moe.convert.output import check_output
from hf_moe.errors import HfMoeError, UsageError
from hf_moe.evaluation import evaluate
from hf_moe.evaluation.run import METRICS_NAME, PREDICTIONS_NAME
from hf_moe.tasks import DataSettings, load_config, load_tokenizer, prepare_data
from hf_moe.tasks.prepare import check_data
from hf_moe.tasks.read import read_splits, where

from .folds import check_labels, groups_of, labels_of, split_rows
from .model import kept_labels
from .processes import on_main
from .recipe import TrainRecipe, without_folders
from .report import versions
from .run import train

FORMAT = 1
REPORT_NAME = "cv.json"
PLAN_NAME = "plan.json"
SPLITS = ("train", "validation", "test")
INNER = 10  # % of the training rows that choose the best checkpoint, where the recipe does not say
UNUSED = ("validation_file", "test_file", "validation_split", "test_split")  # of a recipe for `train`


@dataclass(frozen=True)
class CrossValidated:
    """The folder, and what `cv.json` in it says."""

    path: Path
    report: dict[str, Any]


def cross_validate(
    recipe: TrainRecipe,
    *,
    folds: int,
    group_column: str | None = None,
    keep_models: bool = False,
    overwrite: bool = False,
    run: Callable[[TrainRecipe], Any] = train,
    progress: Callable[[str], None] = lambda stage: None,
) -> CrossValidated:
    """Trains on all folds but one and measures on that one, `folds` times. An interrupted run goes on where it was.

    Args:
        recipe: its training rows are split, those for validation and test left aside; its output becomes a folder
            with `cv.json` and `predictions.jsonl`.
        group_column: rows with the same value are never on two sides; by default the recipe's. Rows of the same text
            never are.
        keep_models: whether each fold's model stays in the folder.
        run: trains by a recipe, and leaves the model in its output.

    Raises:
        UsageError, SourceError, OutputError: in one line; nothing is trained where some fold can't be.
    """
    _check(recipe, folds)
    group_column = group_column or recipe.data.group_column
    recipe, notes = _training_rows_alone(recipe)
    for note in notes:
        progress(note)
    settings, output = dataclasses.replace(recipe.data, validation_split_percentage=0), recipe.output
    check_data(settings, ("train",))
    raw, identity = read_splits(settings, ("train",))
    rows = raw["train"]
    groups, labels = groups_of(rows, settings, group_column), labels_of(rows, settings)
    if labels is not None:
        check_labels(labels, folds, where(settings, "train"))
    held, splitter = split_rows(groups, labels, folds=folds, seed=settings.seed)
    parts = [_parts(recipe, groups, labels, out) for out in held]
    plan = {"folds": folds, "group_column": group_column, "data": identity, "recipe": recipe.to_yaml()}
    new = on_main(lambda: _claim(output, plan, overwrite=overwrite))
    on_main(lambda: _write(output, rows, parts))
    recipes = [_recipe(recipe, output / f"fold-{number}", part) for number, part in enumerate(parts, 1)]
    try:
        for number, one in enumerate(recipes, 1):
            progress(f"fold {number} of {folds}: reading")
            _check_fold(one, output / f"fold-{number}")
    except HfMoeError:
        PartialState().wait_for_everyone()  # all of them read
        if new:  # else there are folds that an interrupted run finished
            on_main(lambda: _give_back(output))
        raise
    on_main(lambda: shutil.rmtree(_aside(output), ignore_errors=True))
    done = []
    for number, one in enumerate(recipes, 1):
        progress(f"fold {number} of {folds}")
        done.append(_fold(one, output / f"fold-{number}", run, keep_models=keep_models))
    told = {"splitter": splitter, "group_column": group_column, "data": identity, "recipe": recipe.flat()}
    report = _report(recipe, done, parts, groups, told, notes)
    on_main(lambda: _finish(output, report, parts, keep_models=keep_models))
    return CrossValidated(output, report)


def _check(recipe: TrainRecipe, folds: int) -> None:
    if folds < 2:
        raise UsageError(f"--folds is {folds}; two or more are needed.")
    if recipe.data.streaming:
        raise UsageError("streaming: folds are made of rows that are all there; leave it out.")
    if recipe.method.resume_from_checkpoint not in (None, False):
        raise UsageError("resume_from_checkpoint: an interrupted cross-validation goes on by itself; leave it out.")
    if recipe.method.peft is not None:
        raise UsageError("peft: adapters alone can't be measured; leave it out.")


def _training_rows_alone(recipe: TrainRecipe) -> tuple[TrainRecipe, list[str]]:
    """A recipe made for `train`, without its other rows; and what there is to say of that."""
    aside = [name for name in UNUSED if getattr(recipe.data, name) is not None]
    if not aside:
        return recipe, []
    nothing: dict[str, Any] = dict.fromkeys(aside)
    data = dataclasses.replace(recipe.data, **nothing)
    note = f"Folds are made of the training rows alone, without the recipe's {' and '.join(aside)}."
    return dataclasses.replace(recipe, data=data), [note]


def _parts(
    recipe: TrainRecipe, groups: list[str], labels: list[str] | None, held: np.ndarray
) -> dict[str, np.ndarray]:
    """Split -> the rows of one fold. Validation rows are cut from those of training where the recipe evaluates."""
    rest = np.setdiff1d(np.arange(len(groups)), held)
    share = recipe.data.validation_split_percentage
    if not share and recipe.arguments["eval_strategy"] == "no":
        return {"train": rest, "test": held}
    own_groups, own_labels = [groups[row] for row in rest], labels and [labels[row] for row in rest]
    most = max(Counter(own_labels).values()) if own_labels else len(own_groups)
    wanted = max(2, min(round(100 / (share or INNER)), most, len(set(own_groups))))
    inner, _ = split_rows(own_groups, own_labels, folds=wanted, seed=recipe.data.seed)
    return {"train": np.delete(rest, inner[0]), "validation": rest[inner[0]], "test": held}


def _claim(output: Path, plan: dict[str, Any], *, overwrite: bool) -> bool:
    """The folder, new, or as an interrupted run of the same plan left it; whether it is new. What it replaces is put
    aside, until it is known that the folds can be trained."""
    file = output / PLAN_NAME
    if not overwrite and file.is_file() and not (output / REPORT_NAME).is_file():
        if json.loads(file.read_text(encoding="utf-8")) != json.loads(json.dumps(plan)):
            raise UsageError(f"{output}: is an interrupted run of another recipe or data; --overwrite starts anew.")
        return False
    check_output(output, [], 0, overwrite, PLAN_NAME)
    if output.exists():
        shutil.rmtree(_aside(output), ignore_errors=True)
        output.rename(_aside(output))
    output.mkdir(parents=True)
    file.write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return True


def _aside(output: Path) -> Path:
    return output.with_name(f".{output.name}.replaced")


def _give_back(output: Path) -> None:
    shutil.rmtree(output)
    if _aside(output).exists():
        _aside(output).rename(output)


def _write(output: Path, rows: Any, parts: list[dict[str, np.ndarray]]) -> None:
    """Files of each fold's rows."""
    for number, part in enumerate(parts, 1):
        folder = output / f"fold-{number}"
        folder.mkdir(exist_ok=True)
        for split, places in part.items():
            rows.select(places.tolist()).to_parquet(str(folder / f"{split}.parquet"))


def _recipe(recipe: TrainRecipe, folder: Path, part: dict[str, np.ndarray]) -> TrainRecipe:
    """The recipe of one fold's model, which knows nothing of the rows that are held out."""
    data = dataclasses.replace(
        recipe.data,
        train_file=str(folder / "train.parquet"),
        validation_file=str(folder / "validation.parquet") if "validation" in part else None,
        dataset_name=None,
        dataset_config_name=None,
        dataset_revision=None,
        train_split=None,
        validation_split_percentage=0,
        max_train_samples=None,
    )
    method = dataclasses.replace(recipe.method, resume_from_checkpoint="auto")
    arguments = recipe.arguments | {"output_dir": str(folder / "model")}
    return dataclasses.replace(recipe, data=data, method=method, arguments=arguments)


def _tested(recipe: TrainRecipe, folder: Path) -> DataSettings:
    """All rows held out, however few an evaluation while training may take."""
    return dataclasses.replace(recipe.data, test_file=str(folder / "test.parquet"), max_eval_samples=None)


def _check_fold(recipe: TrainRecipe, folder: Path) -> None:
    """Raises UsageError where training, or measuring, would refuse the rows: before anything is trained."""
    model, task = recipe.model, recipe.data.task
    code = {"trust_remote_code": model.trust_remote_code}
    config = load_config(model.model_name_or_path, revision=model.revision, **code)
    place, revision = model.tokenizer_name, None
    if place is None:
        place, revision = model.model_name_or_path, model.revision
    tokenizer = load_tokenizer(place, task=task, revision=revision, **code)
    prepare_data(_tested(recipe, folder), tokenizer, config, labels=kept_labels(config, task, model))


def _fold(
    recipe: TrainRecipe, folder: Path, run: Callable[[TrainRecipe], Any], *, keep_models: bool
) -> dict[str, Any]:
    """What its model's figures on the rows held out are, and on the validation rows, if there are any."""
    file = folder / "test" / METRICS_NAME
    if not file.is_file():
        if not (recipe.output / "config.json").is_file():
            run(recipe)
        evaluate(
            [recipe.output],
            _tested(recipe, folder),
            output=folder / "test",
            batch_size=int(recipe.arguments["per_device_eval_batch_size"]),
            trust_remote_code=recipe.model.trust_remote_code,
        )
    if not keep_models:
        on_main(lambda: shutil.rmtree(recipe.output, ignore_errors=True))
    return json.loads(file.read_text(encoding="utf-8"))


def _report(
    recipe: TrainRecipe,
    done: list[dict[str, Any]],
    parts: list[dict[str, np.ndarray]],
    groups: list[str],
    told: dict[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    figures = [found["models"][0]["metrics"] for found in done]
    folds = []
    for number, (found, part) in enumerate(zip(done, parts, strict=True), 1):
        sizes = {split: len(places) for split, places in part.items()}
        apart = {split: len({groups[row] for row in places}) for split, places in part.items()}
        labels = found["data"]["labels"]
        folds.append(
            {"fold": number, "rows": sizes, "groups": apart, "labels": labels, "metrics": figures[number - 1]}
        )
    return without_folders(
        {
            "format": FORMAT,
            "task": recipe.data.task,
            "metric": done[0]["metric"],
            "greater_is_better": done[0]["greater_is_better"],
            "summary": {name: _summary([figure[name] for figure in figures]) for name in figures[0]},
            "folds": folds,
            **told,
            "notes": [
                *notes,
                "sd is over the folds, whose models share training rows: it is no standard error of the mean.",
                *done[0]["notes"],
            ],
            "versions": versions(),
        }
    )


def _summary(values: list[float | None]) -> dict[str, Any]:
    """Mean and sample deviation of the folds that have the figure."""
    held = [value for value in values if value is not None]
    return {
        "mean": statistics.fmean(held) if held else None,
        "sd": statistics.stdev(held) if len(held) > 1 else None,
        "folds": len(held),
    }


def _finish(output: Path, report: dict[str, Any], parts: list[dict[str, np.ndarray]], *, keep_models: bool) -> None:
    """Leaves the report, and each row's prediction by the model that had not seen it."""
    with open(output / PREDICTIONS_NAME, "w", encoding="utf-8") as file:
        for number, part in enumerate(parts, 1):
            folder = output / f"fold-{number}"
            for line in (folder / "test" / PREDICTIONS_NAME).read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                row = int(part["test"][record["row"]]) if not report["recipe"]["packing"] else None
                found = {"fold": number} | record | {"row": row}
                found.pop("model")
                file.write(json.dumps(found, ensure_ascii=False) + "\n")
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (output / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    for folder in sorted(output.glob("fold-*")):
        for split in SPLITS:
            (folder / f"{split}.parquet").unlink(missing_ok=True)
        if not keep_models:
            shutil.rmtree(folder)
