"""What a task is given to prepare its data from, and what it makes of it."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .packing import IGNORED
from .read import where
from .settings import DataSettings

TOO_LONG = "too_long"  # a column of what was cut, counted and taken away again
EXAMPLE = "example"  # a column of `details`: which row as it was read a tokenised one is of


@dataclass(frozen=True, kw_only=True)
class Context:
    """Args:
    raw: split -> its rows as they were read.
    columns: role -> column.
    max_length: tokens of a row.
    given_labels: a trained model's.
    """

    settings: DataSettings
    tokenizer: PreTrainedTokenizerBase
    config: PretrainedConfig
    raw: dict[str, Any]
    columns: dict[str, str]
    max_length: int
    given_labels: list[str] | None

    def place(self, split: str) -> str:
        return where(self.settings, split)

    @property
    def places(self) -> dict[str, str]:
        return {split: self.place(split) for split in self.raw}


@dataclass(kw_only=True)
class Encoded:
    """Args:
    splits: split -> tokenised rows.
    collator: rows -> a batch.
    labels, problem_type: as in `PreparedData`.
    report: split -> what was counted.
    notes: what is true of all splits.
    details: as in `PreparedData`.
    """

    splits: dict[str, Any]
    collator: Callable[[list[dict[str, Any]]], Any]
    labels: list[str] | None = None
    problem_type: str | None = None
    report: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


def tokenised(rows: Any, function: Callable[..., dict[str, Any]], *, indices: bool = False, **arguments: Any) -> Any:
    """New rows, which `function` makes of batches of the old (and, with `indices`, of their numbers).

    The library keeps what it made, and knows a function by its name alone; it is told of our code as well, so that
    another version's rows are not taken for this one's.
    """
    return rows.map(
        _call,
        batched=True,
        with_indices=indices,
        remove_columns=rows.column_names,
        fn_kwargs={"function": function, "arguments": arguments, "code": code_digest()},
    )


def _call(
    *batch: Any, function: Callable[..., dict[str, Any]], arguments: dict[str, Any], code: str
) -> dict[str, Any]:
    return function(*batch, **arguments)


@functools.cache
def code_digest() -> str:
    """Of this folder's files."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def count_cut(rows: Any) -> tuple[Any, dict[str, Any]]:
    """The rows without their `TOO_LONG` column, and how many were too long."""
    truncated = int(sum(rows[TOO_LONG]))
    return rows.remove_columns(TOO_LONG), {"truncated": truncated}


def keep_asked(rows: Any, column: str, asks: Callable[[Any], list[bool]], place: str) -> tuple[Any, dict[str, Any]]:
    """The rows of which something is predicted, and how many others there were.

    Args:
        asks: `column` of some rows -> whether something of each is predicted.

    Raises:
        UsageError: where there are only others.
    """
    kept = rows.filter(asks, batched=True, input_columns=[column])
    if len(kept) == 0:
        raise UsageError(f"{place}: nothing in its rows can be predicted; give longer ones.")
    dropped = len(rows) - len(kept)
    return (kept if dropped else rows), {"nothing_to_predict": dropped}


def has_label(labels: list[list[int]], *, first: int) -> list[bool]:
    """Whether any token from `first` on has one."""
    return [any(label != IGNORED for label in row[first:]) for row in labels]


def check_tokens(rows: Any, place: str, column: str = "input_ids") -> None:
    """Raises UsageError where a row has none: an empty text, of a tokenizer that adds nothing to it."""
    import pyarrow.compute as pc

    lengths = pc.list_value_length(rows.select_columns(column).with_format("arrow")[:][column]).to_pylist()
    if 0 in lengths:
        raise UsageError(f"{place}: row {lengths.index(0) + 1} has no tokens; leave it out.")


def count_tokens(rows: Any, column: str = "input_ids") -> int:
    """Tokens of all rows, without making Python lists of them."""
    import pyarrow.compute as pc

    return sum(
        pc.sum(pc.list_value_length(batch[column])).as_py() or 0 for batch in rows.with_format("arrow").iter(1000)
    )
