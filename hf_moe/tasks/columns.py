"""Which column is what: by the settings, or by the names that are usual."""

from typing import Any

from hf_moe.errors import UsageError

from .settings import DataSettings

# Role -> the setting that names its column.
SETTINGS = {
    "text": "text_column",
    "text_pair": "text_pair_column",
    "negative": "negative_column",
    "label": "label_column",
    "question": "question_column",
    "context": "context_column",
    "answers": "answers_column",
}

# Kind of column -> its name for people.
KINDS = {"text": "text", "words": "a list of words"}


def find_columns(
    rows: Any, settings: DataSettings, usual: dict[str, tuple[str, ...]], optional: tuple[str, ...], place: str
) -> dict[str, str]:
    """Role -> column, for the roles of `usual`, whose names are tried in their order; without `optional` ones that are
    not there.

    Raises:
        UsageError: where a column is missing, naming those there are.
    """
    there = list(rows.column_names or next(iter(rows)))
    found: dict[str, str] = {}
    for role, names in usual.items():
        setting = SETTINGS[role]
        asked = getattr(settings, setting)
        if asked is not None and asked not in there:
            raise UsageError(f"{place}: has no column {asked!r} ({setting}); its columns are {', '.join(there)}.")
        free = [name for name in names if name in there and name not in found.values()]
        if asked is None and not free:
            if role in optional:
                continue
            raise UsageError(
                f"{place}: has no {role} column; name it by {setting}. Its columns are {', '.join(there)}."
            )
        found[role] = asked or free[0]
    return found


def check_texts(rows: Any, column: str, place: str, kind: str = "text") -> None:
    """Raises UsageError where a column does not hold text (or lists of words), or lacks it in some row."""
    from datasets import List, Value

    feature = rows.features[column]
    inner = feature.feature if kind == "words" and isinstance(feature, List) else feature
    if not (isinstance(inner, Value) and "string" in inner.dtype and (kind == "text") == (inner is feature)):
        raise UsageError(f"{place}: column {column!r} should hold {KINDS[kind]}, but holds {_name(feature)}.")
    for row, value in enumerate(rows[column], 1):
        if value is None:
            raise UsageError(f"{place}: row {row} has no {column!r}.")
        if kind == "words" and None in value:
            raise UsageError(f"{place}: row {row}: column {column!r} lacks word {value.index(None) + 1}.")


def _name(feature: Any) -> str:
    """A feature's type in a word."""
    if hasattr(feature, "names"):
        return "classes"
    if hasattr(feature, "feature"):
        return f"lists of {_name(feature.feature)}"
    return str(getattr(feature, "dtype", type(feature).__name__))
