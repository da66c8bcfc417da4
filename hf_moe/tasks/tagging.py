"""Token classification: a tag for each word, given to the first of its tokens."""

from collections import Counter
from functools import partial
from typing import Any

from transformers import DataCollatorForTokenClassification, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import check_texts
from .conll import is_entity_scheme, to_iob2
from .context import EXAMPLE, TOO_LONG, Context, Encoded, count_cut, count_tokens, has_label, keep_asked, tokenised
from .labels import sort_labels
from .lengths import cut
from .packing import IGNORED

KEPT = "kept"  # words of a row that have a token, a column that is counted and taken away again


def prepare_tagging(context: Context) -> Encoded:
    """Tags of entities are brought to IOB2 (every entity begins with B); others, parts of speech say, are left. Rows
    without words are left out; `details` say which row each is of.

    Raises:
        UsageError: for tags that are no words, not as many as words, of no scheme, all the same in training, or not
            known from there.
    """
    tokenizer = context.tokenizer
    if not tokenizer.is_fast:
        raise UsageError("token-classification: the tokenizer does not say which word a token is of; it must be fast.")
    tags = {split: _tags(context, split) for split in context.raw}
    iob2, changed = _one_scheme(tags, context)
    names = _names(iob2, context)
    made = {split: _encode(context, split, iob2[split], names) for split in context.raw}
    report = {split: counted | {"tags_changed": changed[split]} for split, (_, counted) in made.items()}
    return Encoded(
        splits={split: rows.remove_columns(EXAMPLE) for split, (rows, _) in made.items()},
        collator=DataCollatorForTokenClassification(tokenizer),
        labels=names,
        report=report,
        notes={"scheme": "IOB2" if is_entity_scheme(set(names)) else None},
        details={split: rows.select_columns(EXAMPLE) for split, (rows, _) in made.items()},
    )


def _tags(context: Context, split: str) -> list[list[str]]:
    """The tags of each row by name."""
    rows, place = context.raw[split], context.place(split)
    words, column = context.columns["text"], context.columns["label"]
    check_texts(rows, words, place, "words")
    names = getattr(getattr(rows.features[column], "feature", None), "names", None)
    made = []
    for row, (own, cells) in enumerate(zip(rows[words], rows[column], strict=True), 1):
        if not isinstance(cells, list) or any(cell is None for cell in cells):
            raise UsageError(f"{place}: row {row}: column {column!r} should hold a list of tags, but holds {cells!r}.")
        if len(cells) != len(own):
            raise UsageError(f"{place}: row {row} has {len(own)} words, but {len(cells)} tags.")
        if names is None and any(not isinstance(cell, str) for cell in cells):
            raise UsageError(f"{place}: row {row}: tags are numbers without names; give them as words, such as B-PER.")
        made.append([names[cell] if names is not None else cell for cell in cells])
    if not any(made):
        raise UsageError(f"{place}: holds no words.")
    return made


def _one_scheme(
    tags: dict[str, list[list[str]]], context: Context
) -> tuple[dict[str, list[list[str]]], dict[str, int]]:
    found = {tag for rows in tags.values() for row in rows for tag in row}
    entities = _mark_entities(found, context.place(next(iter(tags))))
    made = {split: [to_iob2(row) for row in rows] if entities else rows for split, rows in tags.items()}
    changed = {
        split: sum(a != b for old, new in zip(rows, made[split], strict=True) for a, b in zip(old, new, strict=True))
        for split, rows in tags.items()
    }
    return made, changed


def _mark_entities(tags: set[str], place: str) -> bool:
    """Raises UsageError where some do and others can't."""
    try:
        return is_entity_scheme(tags)
    except ValueError as error:
        raise UsageError(f"{place}: {error}.") from error


def _names(tags: dict[str, list[list[str]]], context: Context) -> list[str]:
    """The labels: a model's, or those of training, an entity's B and I always both."""
    source = "train" if "train" in tags else next(iter(tags))
    found = {tag for row in tags[source] for tag in row}
    if source == "train" and len(found) < 2:
        raise UsageError(f"{context.place(source)}: every word has the tag {min(found)!r}; two are needed to learn.")
    if context.given_labels is None:
        if is_entity_scheme(found):
            found = {"O"} | {f"{letter}-{tag[2:]}" for tag in found - {"O"} for letter in "BI"}
        names, owner = sort_labels(found), "training"
    else:
        names, owner = list(context.given_labels), "the model"
        _mark_entities(set(names), "The model's labels")
    for split, rows in tags.items():
        for row, own in enumerate(rows, 1):
            for tag in own:
                if tag not in names:
                    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
                    raise UsageError(
                        f"{context.place(split)}: row {row} has the tag {tag!r}, which {owner} lacks; it has {shown}."
                    )
    return names


def _encode(context: Context, split: str, tags: list[list[str]], names: list[str]) -> tuple[Any, dict[str, Any]]:
    raw = context.raw[split]
    numbers = {name: number for number, name in enumerate(names)}
    tagged = raw.select_columns([context.columns["text"]]).add_column(
        "hf_moe_tags", [[numbers[tag] for tag in row] for row in tags]
    )
    rows = tokenised(
        tagged,
        _tokens,
        indices=True,
        tokenizer=context.tokenizer,
        truncation=context.settings.truncation,
        column=context.columns["text"],
        length=context.max_length,
    )
    words, kept = sum(map(len, tags)), int(sum(rows[KEPT]))
    rows, counted = count_cut(rows.remove_columns(KEPT))
    rows, dropped = keep_asked(rows, "labels", partial(has_label, first=0), context.place(split))
    counts = Counter(tag for row in tags for tag in row)
    counted |= dropped
    counted |= {"rows": len(raw), "examples": len(rows), "tokens": count_tokens(rows)}
    counted |= {"words": words, "words_lost": words - kept, "labels": {name: counts[name] for name in names}}
    return rows, counted


def _tokens(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    tokenizer: PreTrainedTokenizerBase,
    truncation: str,
    column: str,
    length: int,
) -> dict[str, Any]:
    """The first token of a word has its tag, all others `IGNORED`. A word of which the tokenizer makes nothing, or
    that is cut off, has none."""
    encoded, too_long = cut(tokenizer, length, truncation, batch[column], is_split_into_words=True)
    labels, kept = [], []
    for row, tags in enumerate(batch["hf_moe_tags"]):
        before, made = None, []
        for word in encoded.word_ids(row):
            made.append(tags[word] if word is not None and word != before else IGNORED)
            before = word
        labels.append(made)
        kept.append(sum(label != IGNORED for label in made))
    return {**encoded, "labels": labels, EXAMPLE: indices, KEPT: kept, TOO_LONG: too_long}
