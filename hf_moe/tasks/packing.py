"""Rows of full length, filled with one text after another."""

from collections.abc import Iterator
from typing import Any

import torch

from hf_moe.errors import UsageError

IGNORED = -100

# Whose attention keeps texts apart where positions begin anew: in these Transformers makes the mask from positions.
KEEP_APART = (
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "llama",
    "mistral",
    "mixtral",
    "olmoe",
    "phi",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
)


def check_keeps_apart(family: str, task: str) -> None:
    """Raises UsageError where packed texts would see each other."""
    if task != "causal-lm":
        raise UsageError(
            f"{task}: packed texts can't be kept apart in an encoder; set document_masking to false, or packing."
        )
    if family not in KEEP_APART:
        raise UsageError(
            f"causal-lm: {family} can't keep packed texts apart; set document_masking to false, or packing. "
            f"Known to are {', '.join(KEEP_APART)}."
        )


def pack(
    texts: Any, *, length: int, masking: bool, drop_last: bool, separator: int | None, counts: tuple[str, ...] = ()
) -> Iterator[dict[str, Any]]:
    """Rows of `length` tokens from texts of any.

    Args:
        texts: an iterable of rows with `input_ids`, and of as many `counts` (numbers that go with each token).
        masking: start positions anew with each text, and predict no text's first token from another.
        drop_last: leave out a last row that is not full, unless it is the only one.
        separator: a token that ends each text; None where there is none.

    Yields:
        `input_ids` and `labels`; with `masking` `position_ids`; and each of `counts`.
    """
    row: dict[str, list[int]] = _empty(counts, masking)
    full = False
    for text in texts:
        ids = list(text["input_ids"])
        numbers = {name: list(text[name]) for name in counts}
        if separator is not None and ids and ids[-1] != separator:
            ids.append(separator)
            numbers = {name: [*values, 0] for name, values in numbers.items()}
        start = 0
        while start < len(ids):
            piece = ids[start : start + length - len(row["input_ids"])]
            row["input_ids"] += piece
            if masking:
                row["labels"] += [IGNORED, *piece[1:]]
                row["position_ids"] += range(len(piece))
            else:
                row["labels"] += piece
            for name, values in numbers.items():
                row[name] += values[start : start + len(piece)]
            start += len(piece)
            if len(row["input_ids"]) == length:
                yield row
                row, full = _empty(counts, masking), True
    if row["input_ids"] and not (drop_last and full):
        yield row


def _empty(counts: tuple[str, ...], masking: bool) -> dict[str, list[int]]:
    names = ("input_ids", "labels", *(("position_ids",) if masking else ()), *counts)
    return {name: [] for name in names}


def collate_packed(features: list[dict[str, Any]], *, pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch whose texts are told apart by their positions. A shorter row is filled up with a text of padding, which
    nobody sees and which is not predicted. There is no attention mask: with one, Transformers would not look at the
    positions."""
    length = max(len(feature["input_ids"]) for feature in features)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": [], "position_ids": []}
    for feature in features:
        missing = length - len(feature["input_ids"])
        rows["input_ids"].append([*feature["input_ids"], *[pad_token_id] * missing])
        rows["labels"].append([*feature["labels"], *[IGNORED] * missing])
        rows["position_ids"].append([*feature["position_ids"], *range(missing)])
    return {name: torch.tensor(values) for name, values in rows.items()}
