"""Question answering by a span of a context, in SQuAD's form. A long context is read through overlapping windows."""

from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import check_texts
from .context import Context, Encoded, count_tokens, tokenised

DETAILS = ("example", "offset_mapping")  # which question a window is of; where each token of the context stands


def prepare_answers(context: Context) -> Encoded:
    """Windows; `details` say for each which row it is of, and where its tokens stand in the context.

    A question without an answer (SQuAD 2) is answered by the window's first token, and so is a window in which the
    answer does not lie.

    Raises:
        UsageError: for answers that are not where they say, or a question that leaves no room for a context.
    """
    tokenizer = context.tokenizer
    if not tokenizer.is_fast:
        raise UsageError("question-answering: the tokenizer does not say where tokens stand; it must be fast.")
    made = {split: _encode(context, split) for split in context.raw}
    return Encoded(
        splits={split: rows.remove_columns(list(DETAILS)) for split, (rows, _) in made.items()},
        collator=DataCollatorWithPadding(tokenizer),
        report={split: counted for split, (_, counted) in made.items()},
        details={split: rows.select_columns(list(DETAILS)) for split, (rows, _) in made.items()},
    )


def answer_of(cell: Any) -> tuple[list[str], list[int]]:
    """(texts, where each begins) of a cell of the answers column: SQuAD's two lists, or a list of single answers.

    Raises:
        ValueError: where it is neither.
    """
    if isinstance(cell, list) and all(isinstance(answer, dict) for answer in cell):
        cell = {name: [answer.get(name) for answer in cell] for name in ("text", "answer_start")}
    try:
        texts, starts = list(cell["text"]), list(cell["answer_start"])
    except (TypeError, KeyError) as error:
        raise ValueError("answers should be an object with the lists 'text' and 'answer_start'") from error
    if len(texts) != len(starts) or not all(isinstance(text, str) for text in texts):
        raise ValueError("answers should have a text and an answer_start each")
    if wrong := [start for start in starts if type(start) is not int or start < 0]:
        raise ValueError(f"an answer_start is a whole number from 0 on, not {wrong[0]!r}")
    return texts, starts


def _encode(context: Context, split: str) -> tuple[Any, dict[str, Any]]:
    raw, place, columns = context.raw[split], context.place(split), context.columns
    for role in ("question", "context"):
        check_texts(raw, columns[role], place)
    _check_answers(context, split)
    _check_room(context, split)
    rows = tokenised(
        raw,
        _windows,
        indices=True,
        tokenizer=context.tokenizer,
        columns=columns,
        length=context.max_length,
        stride=context.settings.doc_stride,
    )
    return rows, {"rows": len(raw), "examples": len(rows), "tokens": count_tokens(rows), "truncated": 0}


def _check_answers(context: Context, split: str) -> None:
    raw, columns = context.raw[split], context.columns
    for row, (text, cell) in enumerate(zip(raw[columns["context"]], raw[columns["answers"]], strict=True), 1):
        try:
            for answer, start in zip(*answer_of(cell), strict=True):
                if text[start : start + len(answer)] != answer:
                    found = text[start : start + len(answer)]
                    raise ValueError(f"the answer {answer!r} is not at {start}, where the context has {found!r}")
        except ValueError as error:
            raise UsageError(f"{context.place(split)}: row {row}: {error}.") from error


def _check_room(context: Context, split: str) -> None:
    tokenizer, length, stride = context.tokenizer, context.max_length, context.settings.doc_stride
    questions = list(context.raw[split][context.columns["question"]])
    sizes = [len(ids) for ids in tokenizer(questions, add_special_tokens=False, verbose=False)["input_ids"]]
    left = length - max(sizes) - tokenizer.num_special_tokens_to_add(pair=True)
    if left <= stride:
        row = sizes.index(max(sizes)) + 1
        raise UsageError(
            f"{context.place(split)}: row {row}: a question of {max(sizes)} tokens leaves {max(0, left)} of "
            f"max_length ({length}) for its context; lower doc_stride ({stride}), or raise max_length."
        )


def _windows(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, str],
    length: int,
    stride: int,
) -> dict[str, Any]:
    encoded = tokenizer(
        batch[columns["question"]],
        batch[columns["context"]],
        truncation="only_second",
        max_length=length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    made = {name: encoded[name] for name in encoded if name in tokenizer.model_input_names}
    owners = encoded["overflow_to_sample_mapping"]
    starts, ends, places = [], [], []
    for window, owner in enumerate(owners):
        offsets = [
            (list(span) if part == 1 else None)
            for span, part in zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
        ]
        start, end = _span(offsets, *answer_of(batch[columns["answers"]][owner]))
        starts.append(start)
        ends.append(end)
        places.append(offsets)
    made |= {"start_positions": starts, "end_positions": ends, "offset_mapping": places}
    return made | {"example": [indices[owner] for owner in owners]}


def _span(offsets: list[list[int] | None], texts: list[str], starts: list[int]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0) where it does not lie in the window whole."""
    if not texts:
        return 0, 0
    begin, end = starts[0], starts[0] + len(texts[0])
    inside = [(place, span) for place, span in enumerate(offsets) if span is not None and span[1] > span[0]]
    if not inside or inside[0][1][0] > begin or inside[-1][1][1] < end:
        return 0, 0
    first = max(place for place, span in inside if span[0] <= begin)
    last = min(place for place, span in inside if span[1] >= end)
    return (first, last) if first <= last else (0, 0)
