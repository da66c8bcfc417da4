"""From settings to what Trainer takes: rows of numbers, a collator, labels, and a report of what was read."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import find_columns
from .context import Context
from .files import kind_of
from .lengths import max_length
from .read import read_splits, where
from .settings import SPLITS, DataSettings, check_settings
from .table import TASKS, Task

# Kinds of file that do not fit: kind -> task's side.
TAGGED, PLAIN = "conll", "text"


@dataclass(kw_only=True)
class PreparedData:
    """What a task's model is trained and measured on.

    Args:
        train, validation, test: tokenised rows (an IterableDataset, where training is streamed), or None.
        labels: by number; None where the task has none.
        problem_type: as a configuration calls it.
        collator: rows -> a batch.
        report: JSON-able: what identifies the data, columns, and by split rows, tokens, what was cut, labels.
        task: one of `TASKS`.
        raw: split -> the rows as they were read.
        details: split -> what evaluation must know of each tokenised row, where a row is no example of its own.
    """

    train: Any | None
    validation: Any | None
    test: Any | None
    labels: list[str] | None
    problem_type: str | None
    collator: Callable[[list[dict[str, Any]]], Any]
    report: dict[str, Any]
    task: str
    raw: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def split(self, name: str) -> Any:
        """Its rows, or None."""
        return getattr(self, name)


def find_task(name: str) -> Task:
    """Raises UsageError for a name that is none, with a suggestion."""
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(TASKS)}."
        raise UsageError(f"task {name!r} is not known; {hint}")
    return TASKS[name]


def prepare_data(
    settings: DataSettings,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    *,
    splits: tuple[str, ...] = SPLITS,
    labels: list[str] | None = None,
) -> PreparedData:
    """Reads, checks and tokenises.

    Args:
        tokenizer, config: the model's; nothing of it is loaded.
        splits: those wanted; one that is not there is None, but one must be.
        labels: those of a trained model. Others are refused.

    Raises:
        UsageError: for settings or data that don't fit the task; SourceError: for what can't be read. In one line.
    """
    task = check_data(settings, splits)
    raw, identity = read_splits(settings, splits)
    first = next(iter(raw))
    columns = find_columns(raw[first], settings, task.usual, task.optional, where(settings, first))
    for split, rows in raw.items():
        lacking = [name for name in columns.values() if name not in (rows.column_names or columns.values())]
        if lacking:
            there = ", ".join(rows.column_names)
            raise UsageError(f"{where(settings, split)}: has no column {lacking[0]!r}; its columns are {there}.")
    context = Context(
        settings=settings,
        tokenizer=tokenizer,
        config=config,
        raw=raw,
        columns=columns,
        max_length=max_length(settings, tokenizer, config),
        given_labels=labels,
    )
    made = task.prepare(context)
    report = {"task": settings.task, **identity, "columns": columns, "max_length": context.max_length}
    report |= {"labels": made.labels, "problem_type": made.problem_type, **made.notes, "splits": made.report}
    return PreparedData(
        **{split: made.splits.get(split) for split in SPLITS},
        labels=made.labels,
        problem_type=made.problem_type,
        collator=made.collator,
        report=report,
        task=settings.task,
        raw=raw,
        details=made.details,
    )


def check_data(settings: DataSettings, splits: tuple[str, ...]) -> Task:
    """The task, where its data may do, as far as can be told without reading it.

    Raises:
        UsageError: for settings that can't be meant, or files that can't hold what the task reads.
        SourceError: for a file that is not there.
    """
    task = find_task(settings.task)
    check_settings(settings)
    if settings.streaming and task.labelled:
        raise UsageError(f"{settings.task}: can't be streamed, for its labels are checked first; leave streaming out.")
    for split in splits:
        files = settings.files(split)
        kind = kind_of(files) if files else None
        if kind == PLAIN and task.labelled:
            raise UsageError(f"{files[0]}: is plain text, and {settings.task} needs labels or columns; give .jsonl.")
        if kind == TAGGED and settings.task != "token-classification":
            raise UsageError(f"{files[0]}: CoNLL files are for token-classification, not for {settings.task}.")
    return task
