"""What a task is given to prepare its data from, and what it makes of it."""

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .read import where
from .settings import DataSettings

TOO_LONG = "too_long"  # a column of what was cut, counted and taken away again


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


def count_tokens(rows: Any, column: str = "input_ids") -> int:
    """Tokens of all rows, without making Python lists of them."""
    import pyarrow.compute as pc

    return sum(
        pc.sum(pc.list_value_length(batch[column])).as_py() or 0 for batch in rows.with_format("arrow").iter(1000)
    )
