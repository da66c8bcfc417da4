"""CoNLL files and their tags: one word a line with its tag in the last column, sentences apart by an empty line."""

import re
from collections.abc import Sequence
from pathlib import Path

from hf_moe.errors import SourceError

TAG = re.compile(r"([A-Z])-(.+)")

# How the schemes that are read mark a token: its letter -> IOB2's. An I at the start of an entity becomes B.
LETTERS = {"B": "B", "I": "I", "E": "I", "L": "I", "M": "I", "S": "B", "U": "B"}


def read_conll(file: Path) -> list[list[tuple[str, str]]]:
    """Sentences of (word, tag).

    Lines that begin with -DOCSTART- are left out, and in a file with tabs those that begin with # and hold none
    (CoNLL-U's comments).

    Raises:
        SourceError: for a line with one column, or as many as no other has; with its number.
    """
    sentences: list[list[tuple[str, str]]] = [[]]
    width, text = 0, file.read_text(encoding="utf-8-sig")
    separator = "\t" if "\t" in text else None
    for number, line in enumerate(text.split("\n"), 1):
        line = line.rstrip("\r")
        if not line.strip() or line.startswith("-DOCSTART-"):
            sentences.append([])
            continue
        if separator and line.startswith("#") and separator not in line:
            continue
        columns = [column.strip() for column in line.split(separator)]
        width = width or len(columns)
        if len(columns) != width or width < 2 or not all((columns[0], columns[-1])):
            wanted = f"{width} columns as before" if width > 1 else "a word and its tag"
            raise SourceError(f"{file}: line {number} should hold {wanted}, but is {line.strip()[:40]!r}.")
        sentences[-1].append((columns[0], columns[-1]))
    return [sentence for sentence in sentences if sentence]


def is_entity_scheme(tags: set[str]) -> bool:
    """Whether the tags mark spans (O, B-PER, I-PER, …), and are not parts of speech, say.

    Raises:
        ValueError: where some of them do and others can't.
    """
    spans = {tag for tag in tags if (match := TAG.fullmatch(tag)) and match[1] in LETTERS}
    others = sorted(tags - spans - {"O"})
    if spans and others:
        raise ValueError(f"tag {others[0]!r} is neither O nor of the form B-TYPE or I-TYPE, as {min(spans)!r} is")
    return bool(spans) or tags == {"O"}


def to_iob2(tags: Sequence[str]) -> list[str]:
    """One sentence's tags of IOB1, IOB2, IOBES, BILOU or BMES as IOB2: every entity begins with B.

    An entity ends before a tag of another type, before B, S or U, and after E, L, S or U.
    """
    made: list[str] = []
    before, closed = None, True
    for tag in tags:
        match = TAG.fullmatch(tag)
        if match is None:
            made.append("O")
            before, closed = None, True
            continue
        letter, kind = match.groups()
        starts = LETTERS[letter] == "B" or closed or kind != before
        made.append(f"{'B' if starts else 'I'}-{kind}")
        before, closed = kind, letter in "ELSU"
    return made
