"""Text classification: one label, several, or a number; of a text, or of two."""

from collections.abc import Callable
from typing import Any

from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from .columns import check_texts
from .context import TOO_LONG, Context, Encoded, check_tokens, count_cut, count_tokens, tokenised
from .labels import Labels, find_labels
from .lengths import cut


def prepare_classification(context: Context) -> Encoded:
    """Raises UsageError as `find_labels` does."""
    labels = _labels(context)
    made = {split: _encode(context, split, labels) for split in context.raw}
    return Encoded(
        splits={split: rows for split, (rows, _) in made.items()},
        collator=DataCollatorWithPadding(context.tokenizer),
        labels=labels.names,
        problem_type=labels.problem_type,
        report={split: counted for split, (_, counted) in made.items()},
    )


def _labels(context: Context) -> Labels:
    column = context.columns["label"]
    for split, rows in context.raw.items():
        for role in ("text", "text_pair"):
            if role in context.columns:
                check_texts(rows, context.columns[role], context.place(split))
    feature = next(iter(context.raw.values())).features[column]
    return find_labels(
        {split: list(rows[column]) for split, rows in context.raw.items()},
        class_names=getattr(getattr(feature, "feature", feature), "names", None),
        given=context.given_labels,
        problem_type=context.settings.problem_type,
        places=context.places,
    )


def _encode(context: Context, split: str, labels: Labels) -> tuple[Any, dict[str, Any]]:
    raw, columns = context.raw[split], context.columns
    rows = tokenised(
        raw,
        _tokens,
        tokenizer=context.tokenizer,
        truncation=context.settings.truncation,
        columns=columns,
        length=context.max_length,
        read=labels.read,
    )
    rows, counted = count_cut(rows)
    check_tokens(rows, context.place(split))
    counted |= {"rows": len(raw), "examples": len(rows), "tokens": count_tokens(rows)}
    return rows, counted | ({"labels": labels.counts[split]} if split in labels.counts else {})


def _tokens(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    truncation: str,
    columns: dict[str, str],
    length: int,
    read: Callable[[Any], Any],
) -> dict[str, Any]:
    pairs = batch[columns["text_pair"]] if "text_pair" in columns else None
    encoded, too_long = cut(tokenizer, length, truncation, batch[columns["text"]], pairs)
    return {**encoded, "labels": [read(cell) for cell in batch[columns["label"]]], TOO_LONG: too_long}
