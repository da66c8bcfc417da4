"""Masked and causal language modelling."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import check_texts
from .context import EXAMPLE, TOO_LONG, Context, Encoded, count_cut, count_tokens, has_label, keep_asked, tokenised
from .lengths import cut, family_of
from .packing import IGNORED, check_keeps_apart, collate_packed, pack
from .settings import SHUFFLE_BUFFER_SIZE, DataSettings
from .stream import Stream

WORD = re.compile(r"\S+")
COUNTS = ("words", "bytes")  # of text, that end with a token


def prepare_language(context: Context) -> Encoded:
    """Texts as rows of tokens, or packed. Rows for evaluation have their labels; a masked language model's are masked
    for good, by the seed, so that every evaluation asks for the same tokens. Rows of which nothing can be predicted
    are left out; `details` say which row as it was read each is of.

    Raises:
        UsageError: where the tokenizer has no mask, packed texts can't be kept apart, or nothing can be predicted.
    """
    settings, tokenizer, masked = context.settings, context.tokenizer, context.settings.task == "masked-lm"
    if masked and tokenizer.mask_token_id is None:
        raise UsageError(
            f"masked-lm: the tokenizer of {context.config.model_type} has no mask token; try task causal-lm."
        )
    if settings.packing and settings.document_masking:
        check_keeps_apart(family_of(context.config), settings.task)
    made = {split: _encode(context, split, masked) for split in context.raw}
    return Encoded(
        splits={split: rows for split, (rows, _, _) in made.items()},
        collator=_collator(settings, tokenizer, masked),
        report={split: counted for split, (_, counted, _) in made.items()},
        details={split: details for split, (_, _, details) in made.items() if details is not None},
    )


def _encode(context: Context, split: str, masked: bool) -> tuple[Any, dict[str, Any], Any | None]:
    if context.settings.streaming and split == "train":
        return _streamed(context, split, masked), {}, None
    settings, column, raw, place = context.settings, context.columns["text"], context.raw[split], context.place(split)
    check_texts(raw, column, place)
    texts = [row for row, text in enumerate(raw[column]) if text.strip()]
    counted: dict[str, Any] = {"rows": len(raw), "empty": len(raw) - len(texts)}
    if not texts:
        raise UsageError(f"{place}: holds no text.")
    counts = COUNTS if split != "train" and not masked and context.tokenizer.is_fast else ()
    rows, cut_ = count_cut(_tokenised(raw.select(texts), context, masked, counts))
    counted |= cut_
    if settings.packing:
        counted["tokens_read"] = count_tokens(rows)
        rows = _packed(rows, context, masked=masked, drop_last=split == "train", counts=counts)
    else:
        rows = rows.add_column(EXAMPLE, texts)
    rows, dropped = keep_asked(rows, *_asked(context, masked), place)
    counted |= dropped
    details = None if settings.packing else rows.select_columns(EXAMPLE)
    rows = rows if settings.packing else rows.remove_columns(EXAMPLE)
    if split != "train" and masked:
        rows = rows.map(
            _mask,
            with_indices=True,
            fn_kwargs={"tokenizer": context.tokenizer, "probability": settings.mlm_probability, "seed": settings.seed},
        )
    counted |= {"examples": len(rows), "tokens": count_tokens(rows)}
    if split != "train":
        rows, scored = _count_scored(rows, masked, counts)
        counted |= scored
    return rows, counted, details


def _streamed(context: Context, split: str, masked: bool) -> Stream:
    """Training rows, in another order each epoch.

    Raises:
        UsageError: where there is no text to learn from; while it is read, where a row holds none.
    """
    settings, raw, place = context.settings, context.raw[split], context.place(split)
    checked = {"column": context.columns["text"], "place": place}
    texts = raw.filter(_holds_text, with_indices=True, fn_kwargs=checked)
    rows = _tokenised(texts, context, masked, ()).remove_columns(TOO_LONG)
    if settings.packing:
        rows = _packed(Stream(rows, place), context, masked=masked, drop_last=True, counts=())
    column, asks = _asked(context, masked)
    rows = rows.filter(asks, batched=True, input_columns=[column])
    if next(iter(Stream(rows, place)), None) is None:
        raise UsageError(f"{place}: holds no text of which anything can be predicted.")
    size = SHUFFLE_BUFFER_SIZE if settings.shuffle_buffer_size is None else settings.shuffle_buffer_size
    return Stream(rows.shuffle(seed=settings.seed, buffer_size=size) if size else rows, place)


def _holds_text(row: dict[str, Any], index: int, *, column: str, place: str) -> bool:
    if not isinstance(row[column], str):
        raise UsageError(f"{place}: row {index + 1}: column {column!r} should hold text, but holds {row[column]!r}.")
    return bool(row[column].strip())


def _asked(context: Context, masked: bool) -> tuple[str, Callable[[Any], list[bool]]]:
    """What tells rows of which something is predicted: a column, and what to ask of it."""
    if masked:
        return "input_ids", partial(_can_be_masked, tokenizer=context.tokenizer)
    return "labels", partial(has_label, first=1)  # no row's first token is predicted


def _can_be_masked(rows: list[list[int]], *, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    return [0 in tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) for ids in rows]


def _tokenised(raw: Any, context: Context, masked: bool, counts: tuple[str, ...]) -> Any:
    settings = context.settings
    return tokenised(
        raw,
        _tokens,
        tokenizer=context.tokenizer,
        truncation=settings.truncation,
        column=context.columns["text"],
        length=None if settings.packing else context.max_length,
        labels=not masked and not settings.packing,
        counts=counts,
    )


def _tokens(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    truncation: str,
    column: str,
    length: int | None,
    labels: bool,
    counts: tuple[str, ...],
) -> dict[str, Any]:
    texts = batch[column]
    offsets = {"return_offsets_mapping": True} if counts else {}
    if length is None:
        encoded, too_long = tokenizer(texts, truncation=False, verbose=False, **offsets), [False] * len(texts)
    else:
        encoded, too_long = cut(tokenizer, length, truncation, texts, **offsets)
    made = {"input_ids": encoded["input_ids"], TOO_LONG: too_long}
    if length is not None:
        made["attention_mask"] = encoded["attention_mask"]
        if "token_type_ids" in encoded:
            made["token_type_ids"] = encoded["token_type_ids"]
    if labels:
        made["labels"] = encoded["input_ids"]
    if counts:
        ended = [_ends(text, spans) for text, spans in zip(texts, encoded["offset_mapping"], strict=True)]
        made |= {name: [row[place] for row in ended] for place, name in enumerate(counts)}
    return made


def _ends(text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """(words, bytes) of `text` by token: what lies between the end of the token before and its own. A word is what
    stands between blanks, and belongs to the token that it ends with; special tokens have none."""
    ends = np.maximum.accumulate([end for _, end in spans]) if spans else np.zeros(0, int)
    starts = np.concatenate([[0], ends[:-1]]) if spans else ends
    word_ends = np.array([match.end() for match in WORD.finditer(text)])
    # a tokenizer may leave out what it can't read at the end of a word: the next token has that word
    words = np.searchsorted(word_ends, ends, side="right") - np.searchsorted(word_ends, starts, side="right")
    size = [len(text[start:end].encode()) for start, end in zip(starts, ends, strict=True)]
    return words.tolist(), size


def _packed(rows: Any, context: Context, *, masked: bool, drop_last: bool, counts: tuple[str, ...]):
    from datasets import Dataset, IterableDataset

    settings, tokenizer = context.settings, context.tokenizer
    arguments = {
        "texts": rows,
        "length": context.max_length,
        "masking": settings.document_masking,
        "drop_last": drop_last,
        "separator": None if masked else tokenizer.eos_token_id,
        "counts": counts,
    }
    made = (IterableDataset if isinstance(rows, Stream) else Dataset).from_generator(pack, gen_kwargs=arguments)
    return made.remove_columns("labels") if masked else made


class Masker(DataCollatorForLanguageModeling):
    """Masks at least one token of a row, where any may be: a batch of short rows would have no loss."""

    def torch_mask_tokens(
        self, inputs: Any, special_tokens_mask: Any = None, offset_mapping: Any = None
    ) -> tuple[Any, Any]:
        tokenizer = self.tokenizer
        special = torch.tensor(
            [tokenizer.get_special_tokens_mask(row, already_has_special_tokens=True) for row in inputs.tolist()]
        ).bool()
        made, labels = super().torch_mask_tokens(inputs.clone(), special, offset_mapping)
        for row in ((labels == IGNORED).all(1) & ~special.all(1)).nonzero().flatten().tolist():
            plain = (~special[row]).nonzero().flatten()
            place = plain[torch.randint(len(plain), (1,), generator=self.generator)]
            labels[row, place] = inputs[row, place]
            made[row, place] = tokenizer.mask_token_id
        return made, labels


def _mask(
    row: dict[str, Any], index: int, *, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int
) -> dict[str, Any]:
    """Labels of one row, by seed and index alone."""
    masker = Masker(tokenizer, mlm_probability=float(probability), seed=seed)
    masker.generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    made, labels = masker.torch_mask_tokens(torch.tensor([row["input_ids"]]))
    return {"input_ids": made[0].tolist(), "labels": labels[0].tolist()}


def _count_scored(rows: Any, masked: bool, counts: tuple[str, ...]) -> tuple[Any, dict[str, Any]]:
    """How many tokens are predicted, and of what text. A causal model predicts no row's first token."""
    first = 0 if masked else 1
    totals = dict.fromkeys(("scored_tokens", *counts), 0)
    for row in rows:
        asked = [label != IGNORED for label in row["labels"][first:]]
        totals["scored_tokens"] += sum(asked)
        for name in counts:
            totals[name] += sum(number for number, here in zip(row[name][first:], asked, strict=True) if here)
    return rows.remove_columns(list(counts)) if counts else rows, totals


def _collator(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, masked: bool):
    if masked:
        masker = Masker(tokenizer, mlm_probability=float(settings.mlm_probability))
        return partial(_collate_masked, masker=masker, padder=DataCollatorForTokenClassification(tokenizer))
    if settings.packing and settings.document_masking:
        return partial(collate_packed, pad_token_id=tokenizer.pad_token_id)
    return DataCollatorForTokenClassification(tokenizer)


def _collate_masked(features: list[dict[str, Any]], *, masker: Any, padder: Any) -> Any:
    """Masks rows that have no labels yet, anew each time."""
    return padder(features) if "labels" in features[0] else masker(features)
