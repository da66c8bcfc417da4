"""Masked and causal language modelling."""

import re
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import DataCollatorForLanguageModeling, DataCollatorForTokenClassification, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import check_texts
from .context import TOO_LONG, Context, Encoded, count_cut, count_tokens, tokenised
from .lengths import cut, family_of
from .packing import IGNORED, check_keeps_apart, collate_packed, pack
from .settings import DataSettings

WORD = re.compile(r"\S+")
COUNTS = ("words", "bytes")  # of text, that end with a token


def prepare_language(context: Context) -> Encoded:
    """Texts as rows of tokens, or packed. Rows for evaluation have their labels; a masked language model's are masked
    for good, by the seed, so that every evaluation asks for the same tokens.

    Raises:
        UsageError: where the tokenizer has no mask, or packed texts can't be kept apart.
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
        splits={split: rows for split, (rows, _) in made.items()},
        collator=_collator(settings, tokenizer, masked),
        report={split: counted for split, (_, counted) in made.items()},
        details={split: _texts(context, split) for split in context.raw if split != "train" and not settings.packing},
    )


def _texts(context: Context, split: str) -> Any:
    """Which row of the file each text is, as `example`; rows without text are left out."""
    from datasets import Dataset

    texts = context.raw[split][context.columns["text"]]
    return Dataset.from_dict({"example": [row for row, text in enumerate(texts) if text.strip()]})


def _encode(context: Context, split: str, masked: bool) -> tuple[Any, dict[str, Any]]:
    settings, column, raw = context.settings, context.columns["text"], context.raw[split]
    streamed = settings.streaming and split == "train"
    counted: dict[str, Any] = {}
    if not streamed:
        check_texts(raw, column, context.place(split))
        counted["rows"] = len(raw)
        raw = raw.filter(_holds_text, fn_kwargs={"column": column})
        counted["empty"] = counted["rows"] - len(raw)
        if len(raw) == 0:
            raise UsageError(f"{context.place(split)}: holds no text.")
    counts = COUNTS if split != "train" and not masked and context.tokenizer.is_fast else ()
    rows = tokenised(
        raw,
        _tokens,
        tokenizer=context.tokenizer,
        truncation=settings.truncation,
        column=column,
        length=None if settings.packing else context.max_length,
        labels=not masked and not settings.packing,
        counts=counts,
    )
    if streamed:
        rows = rows.remove_columns(TOO_LONG)
    else:
        rows, cut_ = count_cut(rows)
        counted |= cut_
    if settings.packing:
        if not streamed:
            counted["tokens_read"] = count_tokens(rows)
        rows = _packed(rows, context, masked=masked, training=split == "train", counts=counts, streamed=streamed)
    if split != "train" and masked:
        rows = rows.map(
            _mask,
            with_indices=True,
            fn_kwargs={"tokenizer": context.tokenizer, "probability": settings.mlm_probability, "seed": settings.seed},
        )
    if not streamed:
        counted |= {"examples": len(rows), "tokens": count_tokens(rows)}
        if split != "train":
            rows, scored = _count_scored(rows, masked, counts)
            counted |= scored
    return rows, counted


def _holds_text(row: dict[str, Any], column: str) -> bool:
    return bool(row[column].strip())


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
    texts = [text for text in batch[column] if text and text.strip()]
    if not texts:
        return {"input_ids": [], TOO_LONG: []}
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


def _packed(rows: Any, context: Context, *, masked: bool, training: bool, counts: tuple[str, ...], streamed: bool):
    from datasets import Dataset, IterableDataset

    settings, tokenizer = context.settings, context.tokenizer
    arguments = {
        "texts": rows,
        "length": context.max_length,
        "masking": settings.document_masking,
        "drop_last": training,
        "separator": None if masked else tokenizer.eos_token_id,
        "counts": counts,
    }
    if streamed:
        made = IterableDataset.from_generator(pack, gen_kwargs=arguments)
    else:
        made = Dataset.from_generator(pack, gen_kwargs=arguments)
    return made.remove_columns("labels") if masked else made


def _mask(
    row: dict[str, Any], index: int, *, tokenizer: PreTrainedTokenizerBase, probability: float, seed: int
) -> dict[str, Any]:
    """Labels of one row, by seed and index alone; at least one token is masked where any may be."""
    masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=float(probability), seed=seed)
    masker.generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    ids = torch.tensor([row["input_ids"]])
    special = tokenizer.get_special_tokens_mask(row["input_ids"], already_has_special_tokens=True)
    made, labels = masker.torch_mask_tokens(ids.clone(), special_tokens_mask=torch.tensor([special]))
    plain = [place for place, mark in enumerate(special) if not mark]
    if plain and bool((labels == IGNORED).all()):
        place = plain[int(torch.randint(len(plain), (1,), generator=masker.generator))]
        labels[0, place] = ids[0, place]
        made[0, place] = tokenizer.mask_token_id
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
    if totals["scored_tokens"] == 0:
        raise UsageError("The rows for evaluation leave no token to predict; they are too short.")
    return rows.remove_columns(list(counts)) if counts else rows, totals


def _collator(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, masked: bool):
    if masked:
        masker = DataCollatorForLanguageModeling(tokenizer, mlm_probability=float(settings.mlm_probability))
        return partial(_collate_masked, masker=masker, padder=DataCollatorForTokenClassification(tokenizer))
    if settings.packing and settings.document_masking:
        return partial(collate_packed, pad_token_id=tokenizer.pad_token_id)
    return DataCollatorForTokenClassification(tokenizer)


def _collate_masked(features: list[dict[str, Any]], *, masker: Any, padder: Any) -> Any:
    """Masks rows that have no labels yet, anew each time."""
    return padder(features) if "labels" in features[0] else masker(features)
