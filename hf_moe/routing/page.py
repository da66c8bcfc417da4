"""The report as one page of HTML that needs nothing but itself (needs the `plots` extra, for jinja2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

# Okabe and Ito's colours (jfly.uni-koeln.de/color, 2008), which colour-blind people tell apart; grey stands for black.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#8a8a8a")
# Experts beyond the eighth have the same colours again, and another line under their tokens.
LINES = ("solid", "dashed", "dotted", "double")
GROUNDS = {"light": "#ffffff", "dark": "#14171c"}
TINT = {"light": 0.38, "dark": 0.36}  # so much colour behind the text leaves it readable

# Up to how many times its fair share a load is in each step of the scale, and its name.
STEPS = (
    (0.1, "dead: below 0.1"),
    (0.5, "below 0.5"),
    (0.8, "below 0.8"),
    (1.25, "about fair"),
    (1.6, "above 1.25"),
    (2.0, "above 1.6"),
    (float("inf"), "2 and more times its fair share"),
)


@dataclass(frozen=True)
class Passage:
    """A text as it was routed, T tokens.

    Args:
        domain: what it is of; None: of no domain.
        pieces: (text before the token that belongs to none, the token's own text), by token.
        choices: by layer and token, (expert, gate in percent) in the order of the gates; empty slots are not in it.
    """

    domain: str | None
    pieces: tuple[tuple[str, str], ...]
    choices: tuple[tuple[tuple[tuple[int, int], ...], ...], ...]


def render(summary: dict[str, Any], advice: Sequence[str], passages: Sequence[Passage], title: str) -> str:
    """The page. Everything that comes from a text or a model is escaped.

    Args:
        summary: as `summarise` gives it.
        advice: sentences on what to do next.
        passages: to be shown in colour.
        title: what was looked at.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": _percent, "number": _number, "p": _p_value}
    environment.globals |= {"step": step, "colour": lambda expert: f"c{expert % len(COLOURS)}", "line": _line}
    folder = files("hf_moe.routing")
    template = environment.from_string(folder.joinpath("page.html.j2").read_text(encoding="utf-8"))
    return template.render(
        summary=summary,
        advice=advice,
        passages=passages,
        choices=[passage.choices for passage in passages],
        title=title,
        steps=[name for _, name in STEPS],
        colours=palette(),
        lines=LINES,
        style=folder.joinpath("page.css").read_text(encoding="utf-8"),
        script=folder.joinpath("page.js").read_text(encoding="utf-8"),
    )


def step(share: float | None, fair: float) -> str:
    """Class of a cell: where `share` stands on the scale, relative to what is fair; "" where there is no share."""
    if share is None or share != share:
        return ""
    times = share / fair if fair else 1.0
    return f"h{next(place for place, (limit, _) in enumerate(STEPS) if times < limit)}"


def palette() -> dict[str, list[str]]:
    """Theme -> what stands behind a token, by the colour of its expert."""
    return {
        theme: [_mixed(colour, ground, TINT[theme]) for colour in COLOURS] for theme, ground in GROUNDS.items()
    } | {"full": list(COLOURS)}


def _mixed(colour: str, ground: str, share: float) -> str:
    pairs = ((int(colour[at : at + 2], 16), int(ground[at : at + 2], 16)) for at in (1, 3, 5))
    return "#" + "".join(f"{round(share * one + (1 - share) * other):02x}" for one, other in pairs)


def _line(expert: int) -> str:
    return f"u{expert // len(COLOURS) % len(LINES)}"


def _percent(value: float | None) -> str:
    return "–" if value is None or value != value else f"{100 * value:.1f}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or value != value else f"{value:.{digits}f}"


def _p_value(value: float) -> str:
    return f"{value:.3f}"
