"""Sentence embeddings: texts that belong together, or a score of how much they do."""

from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.errors import UsageError

from .columns import check_texts
from .context import TOO_LONG, Context, Encoded, check_tokens, count_cut, count_tokens, tokenised
from .lengths import cut

# What a row holds, by role: side -> the column's role.
SIDES = {"anchor": "text", "positive": "text_pair", "negative": "negative"}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


class SentenceCollator:
    """Pads each side by itself: `anchor_input_ids`, `anchor_attention_mask`, `positive_input_ids`, …, and `labels`
    (B,), the scores (1 where there are none)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {"labels": torch.tensor([float(feature["labels"]) for feature in features])}
        for side in SIDES:
            names = [name for name in INPUTS if f"{side}_{name}" in features[0]]
            if names:
                rows = [{name: feature[f"{side}_{name}"] for name in names} for feature in features]
                padded = self.tokenizer.pad(rows, return_tensors="pt")
                batch |= {f"{side}_{name}": padded[name] for name in names}
        return batch


def embed(model: PreTrainedModel, batch: dict[str, Any], **options: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Side -> (B, D), mean of the last hidden states over the tokens that are no padding, at length 1; and the model's
    output on all sides in one pass, (sides · B, T), with `options` for it."""
    sides = [side for side in SIDES if f"{side}_input_ids" in batch]
    padding = getattr(getattr(model, "module", model).config, "pad_token_id", None) or 0
    inputs = {}
    for name in INPUTS:
        rows = [batch[f"{side}_{name}"] for side in sides if f"{side}_{name}" in batch]
        if rows:
            length, fill = max(row.shape[1] for row in rows), padding if name == "input_ids" else 0
            inputs[name] = torch.cat([functional.pad(row, (0, length - row.shape[1]), value=fill) for row in rows])
    outputs = model(**inputs, **options)
    mask = inputs["attention_mask"].unsqueeze(-1).to(outputs.last_hidden_state.dtype)
    pooled = (outputs.last_hidden_state * mask).sum(1) / mask.sum(1).clamp(min=1)
    embedded = functional.normalize(pooled.float(), dim=-1).chunk(len(sides))
    return dict(zip(sides, embedded, strict=True)), outputs


def prepare_sentences(context: Context) -> Encoded:
    """Pairs or triplets; with a label column, pairs and their scores.

    Raises:
        UsageError: for a score that is no number.
    """
    made = {split: _encode(context, split) for split in context.raw}
    return Encoded(
        splits={split: rows for split, (rows, _) in made.items()},
        collator=SentenceCollator(context.tokenizer),
        report={split: counted for split, (_, counted) in made.items()},
        notes={"scored": "label" in context.columns, "triplets": "negative" in context.columns},
    )


def _encode(context: Context, split: str) -> tuple[Any, dict[str, Any]]:
    raw, place, columns = context.raw[split], context.place(split), context.columns
    for role in SIDES.values():
        if role in columns:
            check_texts(raw, columns[role], place)
    if "label" in columns:
        for row, cell in enumerate(raw[columns["label"]], 1):
            try:
                float(cell)
            except (TypeError, ValueError) as error:
                raise UsageError(f"{place}: row {row}: a score is a number, not {cell!r}.") from error
    rows = tokenised(
        raw,
        _tokens,
        tokenizer=context.tokenizer,
        truncation=context.settings.truncation,
        columns=columns,
        length=context.max_length,
    )
    rows, counted = count_cut(rows)
    sides = [name for name in rows.column_names if name.endswith("input_ids")]
    for name in sides:
        check_tokens(rows, place, name)
    tokens = sum(count_tokens(rows, name) for name in sides)
    return rows, counted | {"rows": len(raw), "examples": len(rows), "tokens": tokens}


def _tokens(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    truncation: str,
    columns: dict[str, str],
    length: int,
) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for side, role in SIDES.items():
        if role in columns:
            encoded, too_long = cut(tokenizer, length, truncation, batch[columns[role]])
            made |= {f"{side}_{name}": encoded[name] for name in INPUTS if name in encoded}
            made[TOO_LONG] = [a or b for a, b in zip(made.get(TOO_LONG, too_long), too_long, strict=True)]
    scores = batch[columns["label"]] if "label" in columns else [1.0] * len(too_long)
    return made | {"labels": [float(score) for score in scores]}
