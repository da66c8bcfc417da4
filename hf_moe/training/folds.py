"""Folds: which rows are held out when, by what they may not be torn from."""

import hashlib
import json
from collections import Counter
from typing import Any

import numpy as np

from hf_moe.errors import UsageError
from hf_moe.tasks import DataSettings, find_task
from hf_moe.tasks.columns import find_columns
from hf_moe.tasks.labels import problem_type_of
from hf_moe.tasks.read import group_values, where

# By what rows belong together: the texts of these roles, all of a task's, or the first that it has.
TEXTS = ("text", "text_pair", "negative")
CONTEXT = "context"


def split_rows(groups: list[str], labels: list[str] | None, *, folds: int, seed: int) -> tuple[list[np.ndarray], str]:
    """The rows that each fold holds out, and the name of scikit-learn's splitter. With labels, each fold has them in
    like shares.

    Raises:
        UsageError: where there are fewer groups than folds.
    """
    from sklearn import model_selection

    if len(set(groups)) < folds:
        raise UsageError(
            f"There are {len(set(groups))} groups (or different texts) for {folds} folds; take fewer folds."
        )
    grouped = len(set(groups)) < len(groups)
    name = ("Stratified" if labels is not None else "") + ("Group" if grouped else "") + "KFold"
    splitter = getattr(model_selection, name)(n_splits=folds, shuffle=True, random_state=seed)
    given = {"groups": groups} if grouped else {}
    return [np.sort(held) for _, held in splitter.split(np.arange(len(groups)), labels, **given)], name


def groups_of(rows: Any, settings: DataSettings, group_column: str | None = None) -> list[str]:
    """What each row must stay together with: rows of the same text or the same group, and those linked by others."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    columns = columns_of(rows, settings)
    roles = [CONTEXT] if CONTEXT in columns else [role for role in TEXTS if role in columns]
    _, texts = np.unique(_digests(rows, [columns[role] for role in roles]), return_inverse=True)
    if group_column is None:
        return [str(number) for number in texts]
    _, groups = np.unique(group_values(rows, group_column, where(settings, "train")), return_inverse=True)
    size = int(texts.max()) + int(groups.max()) + 2
    links = coo_array((np.ones(len(rows)), (texts, groups + int(texts.max()) + 1)), shape=(size, size))
    _, part = connected_components(links, directed=False)
    return [str(number) for number in part[texts]]


def columns_of(rows: Any, settings: DataSettings) -> dict[str, str]:
    """Role -> column; errors as in `find_columns`."""
    task = find_task(settings.task)
    return find_columns(rows, settings, task.usual, task.optional, where(settings, "train"))


def _digests(rows: Any, columns: list[str]) -> list[str]:
    cells = zip(*(rows[column] for column in columns), strict=True)
    return [hashlib.sha256(json.dumps(cell, ensure_ascii=False).encode()).hexdigest() for cell in cells]


def labels_of(rows: Any, settings: DataSettings) -> list[str] | None:
    """One label a row, where the task has that."""
    if settings.task != "text-classification":
        return None
    cells = list(rows[columns_of(rows, settings)["label"]])
    kind = settings.problem_type or problem_type_of(cells)
    return [str(cell) for cell in cells] if kind == "single_label_classification" else None


def check_labels(labels: list[str], folds: int, place: str) -> None:
    """Raises UsageError where a label can't be in every fold."""
    counts = Counter(sorted(labels))
    rarest = min(counts, key=lambda label: counts[label])
    if counts[rarest] < folds:
        raise UsageError(
            f"{place}: the label {rarest!r} has {counts[rarest]} rows, fewer than the {folds} folds; take fewer, or "
            "leave those rows out."
        )
