"""Text: where it comes from, and the tokenizer of a checkpoint that reads it."""

from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from hf_moe.errors import SourceError, UsageError

from .checkpoint import Checkpoint
from .quiet import quiet

MAX_TOKENS = 128  # of one text


def sample_texts() -> list[str]:
    """Ten sentences of the public domain, of 7 to 60 words."""
    return files("hf_moe.convert").joinpath("sample.txt").read_text(encoding="utf-8").splitlines()


def read_texts(file: Path) -> list[str]:
    """The lines of `file` that hold anything.

    Raises:
        SourceError: where it can't be read as UTF-8; UsageError: where it holds no text.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{file}: can't be read as text ({error}).") from error
    if not lines:
        raise UsageError(f"{file}: holds no text.")
    return lines


def load_tokenizer(checkpoint: Checkpoint) -> PreTrainedTokenizerBase:
    """Raises SourceError where there is none that works."""
    if not checkpoint.has_tokenizer:
        raise SourceError(f"{checkpoint.path}: has no tokenizer, which texts are read with.")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(checkpoint.path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raise it bare
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise SourceError(f"{checkpoint.path}: its tokenizer does not load ({reason}).") from error


def tokenize(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, texts: Iterable[str]) -> list[list[int]]:
    """The ids of each text, cut off at `longest_text`; of some texts there are none."""
    longest = longest_text(config)
    return [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]


def check_ids(rows: Iterable[list[int]], config: PretrainedConfig, path: Path) -> None:
    """Raises SourceError where a row of ids, none of them empty, has one that the vocabulary has not."""
    if any(max(row) >= config.vocab_size for row in rows):
        raise SourceError(f"{path}: its tokenizer gives ids that the model has no rows for.")


def longest_text(config: PretrainedConfig) -> int:
    """Tokens: `MAX_TOKENS`, or what the model has room for."""
    positions = getattr(config, "max_position_embeddings", None) or MAX_TOKENS + 2
    return max(1, min(MAX_TOKENS, positions - 2))  # RoBERTa counts positions from 2
