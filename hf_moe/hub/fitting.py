"""Which texts the experts of each spec are for, so that rows of routers can be fitted to them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_moe.convert.fit import Passages, check_apart, hold_out
from hf_moe.convert.refit import STAYS
from hf_moe.convert.routers import GATES
from hf_moe.convert.slots import SHARED
from hf_moe.convert.texts import read_texts
from hf_moe.errors import UsageError

from .select import Spec

REST = "base"  # the texts that experts which stay are for
DEFAULT_GATE = "hidden"


@dataclass(frozen=True)
class Fitting:
    """Args:
    gate: of `GATES`.
    files: name of each class of text -> its file's name.
    passages: of each class.
    class_of: of each spec, the class that its experts are for; `STAYS` where it has no routed ones.
    rest: the class that experts which stay are for, if its texts were given.
    """

    gate: str
    files: dict[str, str]
    passages: list[Passages]
    class_of: list[int]
    rest: int | None


def read_fitting(specs: Sequence[Spec], texts: Mapping[str, str], gate_mode: str | None) -> Fitting:
    """Finds the texts of each spec, and reads them.

    Args:
        specs: what is put in.
        texts: spec, as it was written or without its experts, or `REST` -> file, a passage a line.
        gate_mode: of `GATES`; by default as in a fusion.

    Raises:
        UsageError, SourceError: where a spec has no texts, texts have no spec, a file can't be read, or nothing tells
            the texts apart.
    """
    gate, names = gate_mode or DEFAULT_GATE, list(texts)
    if gate not in GATES:
        raise UsageError(f"gate_mode is {gate!r}; choose from {', '.join(GATES)}.")
    if not any(_is_routed(spec) for spec in specs):
        raise UsageError("router 'fitted': no spec puts in an expert that has a row.")
    named = [_name(spec, texts) for spec in specs]
    for spec, name in zip(specs, named, strict=True):
        if name is None and _is_routed(spec):
            raise UsageError(
                f"{spec.text}: has no texts, which router 'fitted' fits its rows to; give --texts {spec.source}=FILE."
            )
    for name in texts:
        if name not in named and name != REST:
            routed = ", ".join(spec.text for spec in specs if _is_routed(spec))
            raise UsageError(
                f"--texts {name}={texts[name]}: no such spec with routed experts; there are {routed} (and {REST!r} "
                "for the experts that stay)."
            )
    if len(names) < 2:
        raise UsageError(
            f"--texts: rows are fitted to texts against the texts of others, and there are those of {names[0]} alone; "
            f"give --texts {REST}=FILE for the experts that stay."
        )
    passages = [hold_out(read_texts(Path(file).expanduser())) for file in texts.values()]
    check_apart(passages, names, "texts")
    return Fitting(
        gate=gate,
        files={name: Path(file).name for name, file in texts.items()},
        passages=passages,
        class_of=[STAYS if name is None else names.index(name) for name in named],
        rest=names.index(REST) if REST in texts and REST not in named else None,
    )


def _name(spec: Spec, texts: Mapping[str, str]) -> str | None:
    """By which `texts` call a spec."""
    if not _is_routed(spec):
        return None
    calls = (spec.text, f"{spec.source}@{spec.revision}", spec.source)
    return next((name for name in calls if name in texts), None)


def _is_routed(spec: Spec) -> bool:
    """Whether experts that it puts in may have a row of the router."""
    goals = [choice.to or str(choice) for choice in spec.choices]
    return not goals or not all(goal.endswith(f".{SHARED}") for goal in goals)
