"""Labels: found in the data, sorted so that they are the same every time, and told by number to the model."""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hf_moe.errors import UsageError

UNNAMED = re.compile(r"LABEL_(\d+)")  # Transformers' names where nobody gave any


@dataclass(frozen=True, kw_only=True)
class Labels:
    """What a text classification's labels are.

    Args:
        names: in the order of their numbers; None for a regression.
        problem_type: as Transformers calls it.
        read: a cell of the label column -> what the model takes: a number, or a list of zeros and ones.
        counts: split -> label -> rows.
    """

    names: list[str] | None
    problem_type: str
    read: Callable[[Any], Any]
    counts: dict[str, dict[str, int]]


def find_labels(
    cells: dict[str, Sequence[Any]],
    *,
    class_names: Sequence[str] | None,
    given: Sequence[str] | None,
    problem_type: str | None,
    places: dict[str, str],
) -> Labels:
    """Labels of text classification.

    Args:
        cells: split -> its label column.
        class_names: what a dataset calls its numbers, where it does.
        given: a trained model's labels, in order; others are refused.
        problem_type: or None, to be told by the cells.
        places: split -> what a user calls it.

    Raises:
        UsageError: for a cell of the wrong type, or empty; a label that training does not have; training rows whose
            labels are all the same.
    """
    for split, column in cells.items():
        for row, cell in enumerate(column):
            if cell is None or cell == "" or (class_names is not None and cell == -1):
                raise UsageError(f"{places[split]}: row {row + 1} has no label.")
    kind = problem_type or problem_type_of([cell for column in cells.values() for cell in column], class_names, given)
    if kind == "regression":
        return _regression(cells, places)
    many = kind == "multi_label_classification"
    told = {
        split: [_names(cell, class_names, many, f"{places[split]}: row {row + 1}") for row, cell in enumerate(column)]
        for split, column in cells.items()
    }
    source = "train" if "train" in told else next(iter(told))
    names = _label_list(told[source], class_names, given)
    for split, rows in told.items():
        _check_known(rows, names, places[split], "the model" if given is not None else "training")
    if not names:
        raise UsageError(f"{places[source]}: no row has a label.")
    numbers = _numbers(names)
    if source == "train" and len({frozenset(numbers[name] for name in row) for row in told[source]}) < 2:
        shown = f"the labels {told[source][0]}" if many else f"the label {told[source][0][0]!r}"
        raise UsageError(f"{places[source]}: every row has {shown}; two are needed to learn.")

    def read(cell: Any) -> Any:
        own = [numbers[name] for name in _names(cell, class_names, many, "a row")]
        return [float(number in own) for number in range(len(names))] if many else own[0]

    counts = {split: _count(rows, names, numbers) for split, rows in told.items()}
    return Labels(names=names, problem_type=kind, read=read, counts=counts)


def problem_type_of(
    cells: Sequence[Any], class_names: Sequence[str] | None = None, given: Sequence[str] | None = None
) -> str:
    """What the cells of a label column come to, where nobody says: fractions are a regression's. Arguments as in
    `find_labels`."""
    if any(isinstance(cell, list) for cell in cells):
        return "multi_label_classification"
    if class_names is None and given is None:
        numbers = [_number(cell) for cell in cells]
        if all(number is not None for number in numbers) and any(number % 1 for number in numbers if number):
            return "regression"
    return "single_label_classification"


def _number(cell: Any) -> float | None:
    try:
        return None if isinstance(cell, bool | list) else float(cell)
    except (TypeError, ValueError):
        return None


def _regression(cells: dict[str, Sequence[Any]], places: dict[str, str]) -> Labels:
    for split, column in cells.items():
        for row, cell in enumerate(column):
            number = _number(cell)
            if number is None or not abs(number) < float("inf"):
                raise UsageError(f"{places[split]}: row {row + 1}: a regression's label is a number, not {cell!r}.")
    train = cells.get("train")
    if train is not None and len({float(cell) for cell in train}) < 2:
        raise UsageError(f"{places['train']}: every row has the label {train[0]!r}; two are needed to learn.")
    return Labels(names=None, problem_type="regression", read=float, counts={})


def _names(cell: Any, class_names: Sequence[str] | None, many: bool, place: str) -> list[str]:
    """The labels of one cell. Several are a list, or text with commas between them."""
    if many and isinstance(cell, str):
        cell = [part.strip() for part in cell.split(",") if part.strip()]
    if isinstance(cell, list) != many:
        wanted = "a list of labels" if many else "one label"
        raise UsageError(f"{place}: should have {wanted}, but has {cell!r}.")
    return [_name(one, class_names, place) for one in (cell if many else [cell])]


def _name(cell: Any, class_names: Sequence[str] | None, place: str) -> str:
    if isinstance(cell, float) and cell % 1 == 0:
        cell = int(cell)
    if not isinstance(cell, str | int):
        raise UsageError(f"{place}: {cell!r} is no label; labels are words or whole numbers.")
    if class_names is not None and isinstance(cell, int) and not isinstance(cell, bool):
        return str(class_names[cell])
    return str(cell)


def sort_labels(names: set[str]) -> list[str]:
    """In alphabetical order; numbers in theirs."""
    return sorted(names, key=lambda name: (0, int(name), name) if re.fullmatch(r"-?\d+", name) else (1, 0, name))


def _label_list(rows: list[list[str]], class_names: Sequence[str] | None, given: Sequence[str] | None) -> list[str]:
    if given is not None:
        return list(given)
    if class_names is not None:
        return list(class_names)
    return sort_labels({name for row in rows for name in row})


def _numbers(names: list[str]) -> dict[str, int]:
    """Label -> its number. A model whose labels have no names takes their numbers."""
    numbers = {name: number for number, name in enumerate(names)}
    if all((match := UNNAMED.fullmatch(name)) and int(match[1]) == number for name, number in numbers.items()):
        numbers |= {str(number): number for number in range(len(names))}
    return numbers


def _check_known(rows: list[list[str]], names: list[str], place: str, owner: str) -> None:
    known = _numbers(names)
    for row, labels in enumerate(rows):
        for label in labels:
            if label not in known:
                shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
                raise UsageError(
                    f"{place}: row {row + 1} has the label {label!r}, which {owner} lacks; it has {shown}."
                )


def _count(rows: list[list[str]], names: list[str], numbers: dict[str, int]) -> dict[str, int]:
    counted = Counter(names[numbers[label]] for row in rows for label in row)
    return {name: counted[name] for name in names}
