"""What an interrupted run leaves for the next: which bytes of which file are on disk."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from .writer import Mark

JOURNAL_NAME = "journal.jsonl"


class Journal:
    """Lines of JSON: first the fingerprint of what is written, then a mark each time a file's bytes are durable.

    Args:
        file: where it lies.
        fingerprint: of the run; the marks of another are worth nothing.
    """

    def __init__(self, file: Path, fingerprint: str):
        self.file = file
        self.marks = _read(file, fingerprint)
        if not self.marks:
            self._append({"fingerprint": fingerprint}, os.O_TRUNC)

    def mark(self, mark: Mark) -> None:
        self.marks[mark.file] = mark
        self._append(asdict(mark), os.O_APPEND)

    def _append(self, line: dict[str, object], flag: int) -> None:
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | flag, 0o666)
        try:
            os.write(handle, json.dumps(line).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)


def _read(file: Path, fingerprint: str) -> dict[str, Mark]:
    """The last mark of each file; a line that a kill cut short ends it."""
    marks: dict[str, Mark] = {}
    try:
        first, *lines = file.read_text(encoding="utf-8").splitlines()
        if json.loads(first) == {"fingerprint": fingerprint}:
            for line in lines:
                mark = Mark(**json.loads(line))
                marks[mark.file] = mark
    except (OSError, ValueError, TypeError):
        pass
    return marks
