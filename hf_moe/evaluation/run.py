"""Models on the same rows: predicted, measured, compared, and written."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from hf_moe.convert.certificate import without_nan
from hf_moe.convert.output import check_output, whole_folder
from hf_moe.errors import UsageError
from hf_moe.tasks import DataSettings, PreparedData, load_config, load_model, load_tokenizer, prepare_data
from hf_moe.tasks.extras import need
from hf_moe.tasks.prepare import check_data

from . import plots
from .bootstrap import RESAMPLES, paired_bootstrap
from .measured import Measured
from .metrics import MEASURES
from .predict import predict

FORMAT = 1
METRICS_NAME = "metrics.json"
PREDICTIONS_NAME = "predictions.jsonl"


@dataclass(frozen=True)
class Evaluated:
    """What was measured: `metrics.json`, and the folder it lies in (None: nowhere)."""

    report: dict[str, Any]
    path: Path | None


@dataclass(frozen=True)
class _Model:
    name: str
    path: str
    parameters: int
    prepared: PreparedData
    measured: Measured


def evaluate(
    models: Sequence[str | os.PathLike[str]],
    settings: DataSettings,
    *,
    split: str = "test",
    output: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    dtype: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    more: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Evaluated:
    """Measures each model on the same split, and each but the first against the first.

    Args:
        models: folders or Hub ids; what the others are held against first, a dense control say.
        settings: the task and its data.
        split: the one that is measured.
        output: a folder that does not exist yet, for `metrics.json`, `predictions.jsonl`, and pictures of a
            classification where matplotlib is installed.
        dtype: of the weights in memory; by default as they are stored.
        resamples, seed: of the paired bootstrap.
        revision: of a single Hub checkpoint.
        more: put into the report as it is.

    Raises:
        UsageError, SourceError, OutputError: in one line; nothing is written.
    """
    need("train", "datasets", "sklearn", "seqeval")
    check_data(settings, (split,))
    paths = [os.fspath(model) for model in models]
    if not paths:
        raise UsageError("Name a model to evaluate.")
    if len(set(paths)) < len(paths):
        raise UsageError(f"{next(path for path in paths if paths.count(path) > 1)}: is named twice.")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UsageError(f"dtype {dtype!r} is none of torch's; such as float32 or bfloat16.")
    if batch_size < 1 or resamples < 100:
        raise UsageError("batch_size must be at least 1, and resamples at least 100.")
    main = PartialState().is_main_process
    folder = None if output is None else Path(output).expanduser()
    if folder is not None and main:
        check_output(folder, [Path(path) for path in paths if Path(path).is_dir()], 0, overwrite, METRICS_NAME)
    loading = {"revision": revision, "trust_remote_code": trust_remote_code}
    done = []
    for name, path in zip(_names(paths), paths, strict=True):
        progress(f"{name}: reading")
        done.append(_one(name, path, settings, split, batch_size, dtype, loading, progress))
    progress("comparing")
    compared = [
        paired_bootstrap(done[0].measured, other.measured, resamples=resamples, seed=seed) for other in done[1:]
    ]
    report = without_nan(_report(done, compared, settings, split) | (more or {}))
    if folder is not None and main:
        with whole_folder(folder, "evaluation", overwrite, METRICS_NAME) as (files, _):
            _write(files, report, done)
    PartialState().wait_for_everyone()
    return Evaluated(report, folder)


def _one(
    name: str,
    path: str,
    settings: DataSettings,
    split: str,
    batch_size: int,
    dtype: str | None,
    loading: dict[str, Any],
    progress: Callable[[str], None],
) -> _Model:
    task = settings.task
    config, tokenizer = load_config(path, **loading), load_tokenizer(path, task=task, **loading)
    labels, own = _labels(task, config), settings
    if task == "text-classification" and settings.problem_type is None:
        kind = getattr(config, "problem_type", None) or ("regression" if len(labels or []) == 1 else None)
        own = replace(settings, problem_type=kind or "single_label_classification")  # type: ignore[arg-type]
    if own.problem_type == "regression":
        labels = None
    options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    model = load_model(task, path, **loading, **options)
    new: Any = model.new_weights
    if new and task != "sentence-embedding":
        raise UsageError(f"{path}: has no trained head for {task} ({new[0]} is missing); train it first.")
    prepared = prepare_data(own, tokenizer, config, splits=(split,), labels=labels)
    progress(f"{name}: running")
    predictions, truth = predict(model, prepared, split, batch_size=batch_size)
    measured = MEASURES[task](predictions, truth, prepared, split)
    return _Model(name, path, sum(p.numel() for p in model.parameters()), prepared, measured)


def _labels(task: str, config: Any) -> list[str] | None:
    if task not in ("text-classification", "token-classification"):
        return None
    return [str(config.id2label[number]) for number in range(config.num_labels)]


def _names(paths: list[str]) -> list[str]:
    """What the models are called: their folders' names, or where two are alike the whole paths."""
    short = [Path(path).name if Path(path).is_dir() else path for path in paths]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]


def _report(done: list[_Model], compared: list[dict[str, Any]], settings: DataSettings, split: str) -> dict[str, Any]:
    first = done[0]
    versions = ("hf_moe", "torch", "transformers", "datasets", "scikit-learn", "seqeval", "scipy")
    return {
        "format": FORMAT,
        "task": settings.task,
        "split": split,
        "metric": first.measured.metric,
        "greater_is_better": first.measured.greater_is_better,
        "data": first.prepared.report,
        "models": [
            {
                "name": model.name,
                "path": Path(model.path).name if Path(model.path).is_absolute() else model.path,
                "parameters": model.parameters,
                "metrics": model.measured.metrics,
                **model.measured.tables,
            }
            for model in done
        ],
        "comparisons": [
            {"model": model.name, "against": first.name, **found}
            for model, found in zip(done[1:], compared, strict=True)
        ],
        "notes": first.measured.notes,
        "versions": {name: metadata.version(name) for name in versions},
    }


def _write(folder: Path, report: dict[str, Any], done: list[_Model]) -> None:
    pictures: list[str] = []
    if util.find_spec("matplotlib") is not None:
        for number, model in enumerate(done, 1):
            ending = "" if len(done) == 1 else f"-{number}"
            pictures += plots.draw(model.measured, model.prepared.labels, folder, ending, model.name)
    report["pictures"] = pictures
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / METRICS_NAME).write_text(text + "\n", encoding="utf-8")
    with open(folder / PREDICTIONS_NAME, "w", encoding="utf-8") as file:
        for model in done:
            for record in model.measured.records:
                line = json.dumps({"model": model.name} | without_nan(record), allow_nan=False, ensure_ascii=False)
                file.write(line + "\n")
