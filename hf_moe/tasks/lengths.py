"""How long a row may be."""

from typing import Any

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from hf_moe.errors import UsageError
from hf_moe.modeling import CONFIGS

from .settings import DataSettings

USUAL = 512
NO_LIMIT = 1_000_000  # tokenizers without a limit have one of 10^30

# Families that count positions from after the padding's: one for it and one more are never a token's.
COUNTED_FROM_PADDING = ("roberta", "xlm-roberta", "mpnet")


def family_of(config: PretrainedConfig) -> str:
    """The dense `model_type` that a configuration is of, a mixture's too."""
    return next((dense for dense, ours in CONFIGS.items() if isinstance(config, ours)), config.model_type)


def room(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int | None:
    """Tokens that the model has positions for; None where there is no limit."""
    limits = [tokenizer.model_max_length]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        padding = (config.pad_token_id or 0) + 1 if family_of(config) in COUNTED_FROM_PADDING else 0
        limits.append(positions - padding)
    limits = [limit for limit in limits if limit < NO_LIMIT]
    return min(limits, default=None)


def max_length(settings: DataSettings, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> int:
    """Tokens of a row: as set, or what the model has room for, at most `USUAL`.

    Raises:
        UsageError: where it is more than the model has room for.
    """
    limit = room(tokenizer, config)
    wanted = settings.max_length
    if wanted is not None and limit is not None and wanted > limit:
        raise UsageError(f"max_length is {wanted}, but the model has room for {limit} tokens.")
    return wanted or min(USUAL, limit or USUAL)


def cut(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    truncation: str,
    texts: Any,
    pairs: Any = None,
    **options: Any,
) -> tuple[Any, list[bool]]:
    """Tokens of texts, cut at `length`, and whether each was too long.

    Raises:
        UsageError: where one is and `truncation` is "refuse".
    """
    given = [texts] if pairs is None else [texts, pairs]
    encoded = tokenizer(*given, truncation=False, verbose=False, **options)
    too_long = [len(ids) > length for ids in encoded["input_ids"]]
    if any(too_long) and truncation == "refuse":
        tokens = len(encoded["input_ids"][too_long.index(True)])
        raise UsageError(
            f"A row of {tokens} tokens is longer than max_length ({length}); cut it (truncation: truncate), or raise "
            "max_length."
        )
    if any(too_long):
        encoded = tokenizer(*given, truncation=True, max_length=length, verbose=False, **options)
    return encoded, too_long
