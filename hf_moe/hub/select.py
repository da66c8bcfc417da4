"""How experts are named on the command line: `LAYER.EXPERT`, and `REPO@rev#LAYER.EXPERT`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hf_moe.convert.slots import SHARED
from hf_moe.errors import UsageError

_ITEM = re.compile(rf"(\d{{1,9}}|\*)\.(\d{{1,9}}|\*|{SHARED})(?:=(\d{{1,9}})\.(\d{{1,9}}|{SHARED}))?")


@dataclass(frozen=True)
class Choice:
    """`layer` and `expert`, "*" for all; `to` is where it goes, as LAYER.EXPERT, "" for its own place."""

    layer: str
    expert: str
    to: str = ""

    def __str__(self) -> str:
        return f"{self.layer}.{self.expert}"

    def fits(self, key: str) -> bool:
        """Whether it means LAYER.EXPERT. (A star means the shared expert too.)"""
        layer, _, expert = key.partition(".")
        return self.layer in ("*", layer) and self.expert in ("*", expert)


@dataclass(frozen=True)
class Spec:
    """Experts of an artefact: a folder or a repository, at a revision, all of them or `choices`; `text` as written."""

    source: str
    revision: str | None
    choices: tuple[Choice, ...]
    text: str = ""


def parse_choices(texts: Iterable[str]) -> tuple[Choice, ...]:
    """Of "0.3", "2.*", "*.1,0.shared", "0.3=0.5".

    Raises:
        UsageError: where one is none of these.
    """
    made = []
    for item in (item.strip() for text in texts for item in text.split(",")):
        match = _ITEM.fullmatch(item)
        if match is None or (match[3] and "*" in (match[1], match[2])):
            raise UsageError(
                f"{item!r} names no expert; write LAYER.EXPERT (0.3), with * for all (2.*), or LAYER.{SHARED}, and "
                "LAYER.EXPERT=LAYER.EXPERT to put one elsewhere."
            )
        to = f"{int(match[3])}.{_plain(match[4])}" if match[3] else ""
        made.append(Choice(_plain(match[1]), _plain(match[2]), to))
    return tuple(made)


def _plain(number: str) -> str:
    return str(int(number)) if number.isdigit() else number


def parse_spec(text: str) -> Spec:
    """Of "REPO", "REPO@rev#0.3,1.*" or a folder's path. Errors as in `parse_choices`."""
    source, mark, items = text.rpartition("#")
    if not mark or is_folder(text):
        source, items = text, ""
    choices = parse_choices([items]) if items else ()
    if mark and source != text and not items:
        raise UsageError(f"{text}: names no expert after '#'.")
    revision = None
    if not is_folder(source) and "@" in source:
        source, _, revision = source.rpartition("@")
    return Spec(source, revision or None, choices, text)


def is_folder(text: str) -> bool:
    """Whether a folder of this machine has that name."""
    try:
        return Path(text).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # a name too long, a home that is nobody's
        return False


def parse_specs(texts: Iterable[str]) -> Spec:
    """Several of one repository and revision, as one. Errors as in `parse_choices`, or where they are of several."""
    specs = [parse_spec(text) for text in texts]
    first = specs[0]
    for spec in specs:
        if (spec.source, spec.revision) != (first.source, first.revision):
            raise UsageError(
                f"{spec.source}: is another repository or revision than {first.source}; pull one at a time (compose "
                "takes several)."
            )
    whole = any(not spec.choices for spec in specs)
    return Spec(first.source, first.revision, () if whole else tuple(c for spec in specs for c in spec.choices))


def parse_indices(texts: Iterable[str]) -> list[tuple[int, int]]:
    """Of LAYER.EXPERT, without stars. Errors as in `parse_choices`."""
    choices = parse_choices(texts)
    for choice in choices:
        if choice.to or not (choice.layer + choice.expert).isdigit():
            raise UsageError(f"{choice}: is no single expert; write LAYER.EXPERT, as 0.3.")
    return [(int(choice.layer), int(choice.expert)) for choice in choices]


def chosen(keys: Iterable[str], choices: tuple[Choice, ...], where: str) -> set[str]:
    """Of the experts `keys`, LAYER.EXPERT each, those that are chosen; all where nothing is.

    Raises:
        UsageError: where a choice means none of them.
    """
    held = dict.fromkeys(keys)
    if not choices:
        return set(held)
    for choice in choices:
        if not any(choice.fits(key) for key in held):
            first, last = next(iter(held), "none"), next(reversed(held), "none")
            raise UsageError(f"{where}: has no expert {choice}; it has {first} to {last} (LAYER.EXPERT).")
    return {key for key in held if any(choice.fits(key) for choice in choices)}
