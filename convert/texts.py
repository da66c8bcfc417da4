"""Files of text: one passage a line."""

from pathlib import Path

from hf_moe.errors import SourceError, UsageError


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
