"""The rows of each split: from files, from the Hub or from a folder, and cut as the settings say."""

import os
import re
from pathlib import Path
from typing import Any

from hf_moe.convert.checkpoint import file_sha256
from hf_moe.errors import HfMoeError, SourceError, UsageError

from .extras import need
from .files import read_files
from .settings import SPLITS, DataSettings

# What a dataset may call a split, where the settings say nothing.
USUAL = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}

COMMIT = re.compile(r"[0-9a-f]{40}")


def read_splits(settings: DataSettings, wanted: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split -> its rows, for those of `wanted` that there are, and what identifies the data.

    Raises:
        UsageError: where a split is empty, or none of those wanted is there.
        SourceError: where something can't be read.
    """
    need("train", "datasets", "sklearn")
    read = _from_files if settings.dataset_name is None else _from_dataset
    held, identity = read(settings, wanted)
    if not held:
        raise UsageError(f"There is no {' or '.join(wanted)} split; name its file or its split.")
    if settings.validation_split_percentage and "train" in held and "validation" in wanted:
        held = _cut_validation(held, settings)
    for split, rows in held.items():
        limit = settings.max_train_samples if split == "train" else settings.max_eval_samples
        held[split] = _first(rows, limit, streaming=settings.streaming, split=split)
        if not settings.streaming and len(held[split]) == 0:
            raise UsageError(f"{where(settings, split)}: holds no rows.")
    return {split: held[split] for split in SPLITS if split in held}, identity


def where(settings: DataSettings, split: str) -> str:
    """What a user calls a split."""
    files = settings.files(split) or settings.files("train")
    return files[0] if len(files) == 1 else f"the {split} split"


def _from_files(settings: DataSettings, wanted: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    held = {split: read_files(settings.files(split), settings) for split in wanted if settings.files(split)}
    files = list(dict.fromkeys(name for split in SPLITS for name in settings.files(split)))
    names = [Path(name).name if Path(name).is_absolute() else name for name in files]  # no folder of this machine
    names = [name if names.count(name) == 1 else file for name, file in zip(names, files, strict=True)]
    paths = {name: Path(file).expanduser() for name, file in zip(names, files, strict=True)}
    return held, {"files": _digests(paths, settings)}


def _from_dataset(settings: DataSettings, wanted: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    from datasets import load_dataset_builder

    name = str(settings.dataset_name)
    folder = Path(name).expanduser()
    try:
        builder = load_dataset_builder(
            str(folder) if folder.is_dir() else name,
            settings.dataset_config_name,
            revision=settings.dataset_revision,
        )
        if not settings.streaming:
            builder.download_and_prepare()
        held = builder.as_streaming_dataset() if settings.streaming else builder.as_dataset()
    except HfMoeError:
        raise
    except Exception as error:  # the library raises anything
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise SourceError(f"{name}: can't be loaded as a dataset ({reason}).") from error
    called: dict[str, str] = {}
    for split in wanted:
        asked = getattr(settings, f"{split}_split")
        if asked is not None and asked not in held:
            raise UsageError(f"{name}: has no split {asked!r}; it has {', '.join(held)}.")
        there = asked or next((usual for usual in USUAL[split] if usual in held), None)
        if there is not None:
            called[split] = there
    found = {split: held[there] for split, there in called.items()}
    return found, _dataset_identity(settings, builder, folder, found, called)


def _dataset_identity(
    settings: DataSettings, builder: Any, folder: Path, found: dict[str, Any], called: dict[str, str]
) -> dict[str, Any]:
    """A dataset's name, with its commit on the Hub or digests of its files; where it has neither, with the library's
    fingerprints, which a copy does not share."""
    made: dict[str, Any] = {
        "dataset_name": settings.dataset_name,
        "dataset_config_name": settings.dataset_config_name,
        "dataset_revision": settings.dataset_revision,
    }
    if COMMIT.fullmatch(builder.hash or ""):  # of the cache too, where the Hub is out of reach
        return made | {"dataset_revision": builder.hash}
    files = [Path(file) for name in called.values() for file in (builder.config.data_files or {}).get(name, [])]
    if files and all(file.is_file() for file in files):
        names = {Path(os.path.relpath(file, folder.resolve())).as_posix(): file for file in files}
        return made | {"files": _digests(names, settings)}
    return made | {"fingerprints": {split: getattr(rows, "_fingerprint", None) for split, rows in found.items()}}


def _cut_validation(held: dict[str, Any], settings: DataSettings) -> dict[str, Any]:
    if "validation" in held:
        raise UsageError("There are validation rows already; leave validation_split_percentage out.")
    if settings.streaming:
        raise UsageError("streaming can't draw validation rows; give validation_file, or another split.")
    rows, share = held["train"], settings.validation_split_percentage / 100
    if len(rows) < 2:
        raise UsageError(f"{where(settings, 'train')}: is too small to draw validation rows from.")
    if settings.group_column is None:
        parts = rows.train_test_split(test_size=max(share, 1 / len(rows)), seed=settings.seed)
        return held | {"train": parts["train"], "validation": parts["test"]}
    from sklearn.model_selection import GroupShuffleSplit

    groups = group_values(rows, settings.group_column, where(settings, "train"))
    if len(set(groups)) < 2:
        raise UsageError(f"{where(settings, 'train')}: column {settings.group_column!r} holds one group only.")
    splitter = GroupShuffleSplit(n_splits=1, test_size=share, random_state=settings.seed)
    train, validation = next(splitter.split(groups, groups=groups))
    if len(train) == 0:
        raise UsageError(f"{where(settings, 'train')}: {share:.0%} of the groups leave none to train on.")
    return held | {"train": rows.select(sorted(train)), "validation": rows.select(sorted(validation))}


def group_values(rows: Any, column: str, place: str) -> list[str]:
    """The group of each row; UsageError where there is no such column, or a row without one."""
    if column not in rows.column_names:
        raise UsageError(f"{place}: has no column {column!r}; its columns are {', '.join(rows.column_names)}.")
    values = list(rows[column])
    if None in values:
        raise UsageError(f"{place}: row {values.index(None) + 1} has no {column!r}, which groups are made by.")
    return [str(value) for value in values]


def _first(rows: Any, limit: int | None, *, streaming: bool, split: str) -> Any:
    """The first rows. What is streamed for evaluation is read whole: its figures are of all rows, each time."""
    if not streaming:
        return rows if limit is None else rows.select(range(min(limit, len(rows))))
    taken = rows if limit is None else rows.take(limit)
    if split == "train":
        return taken
    from datasets import Dataset

    return Dataset.from_list(list(taken))


def _digests(files: dict[str, Path], settings: DataSettings) -> dict[str, dict[str, Any]]:
    """By name. What is streamed is too large to be read twice."""
    return {
        name: {"bytes": file.stat().st_size, "sha256": None if settings.streaming else file_sha256(file)}
        for name, file in files.items()
    }
