"""The card: fixed templates, filled with values that can't become markup."""

import json
import re
from importlib import resources
from typing import Any

from hf_moe import model_cards
from hf_moe.errors import UsageError

from .metadata import metadata_of

# Kind -> template.
TEMPLATES = {
    "upcycled": "upcycled.md.j2",
    "fine-tuned": "fine_tuned.md.j2",
    "fused": "fused.md.j2",
    "experts": "experts.md.j2",
}
MARKUP = re.compile(r"([\\`*_\[\]{}#|~!$])")
HTML = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;"})


def render(facts: dict[str, Any]) -> str:
    """The card's text: metadata, then the template of the model's kind.

    Raises:
        UsageError: where jinja2 is not installed.
    """
    try:
        from jinja2 import DictLoader, StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment
        from markupsafe import Markup
    except ImportError as error:
        raise UsageError("a card needs jinja2; install it with `pip install hf_moe[plots]`.") from error

    def finalize(value: Any) -> Markup:
        return value if isinstance(value, Markup) else Markup(plain(value))

    def as_code(value: Any, language: str = "") -> Markup:
        return Markup(fenced(str(value), language))

    folder = resources.files(model_cards)
    names = ["card.md.j2", *TEMPLATES.values()]
    environment = ImmutableSandboxedEnvironment(
        loader=DictLoader({name: folder.joinpath(name).read_text(encoding="utf-8") for name in names}),
        undefined=StrictUndefined,
        finalize=finalize,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "fenced": as_code,
        "code": lambda value: Markup(inline(str(value))),
        "literal": lambda value: Markup(json.dumps(str(value))),
        "number": lambda value: Markup(plain(number(value))),
    }
    body = environment.get_template(TEMPLATES[facts["kind"]]).render(**facts)
    body = re.sub(r"\n{3,}", "\n\n", body).strip()
    return f"---\n{metadata_of(facts).to_yaml()}\n---\n\n{body}\n"


def plain(value: Any) -> str:
    """A value as text on one line: neither HTML nor Markdown."""
    return MARKUP.sub(r"\\\1", " ".join(str(value).split())).translate(HTML)


def fenced(text: str, language: str = "") -> str:
    """A block of code, whatever `text` holds: its fence is longer than any in it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def inline(text: str) -> str:
    """Code within a line."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    space = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{space}{text.replace('|', chr(0xA6))}{space}{fence}"


def number(value: Any) -> str:
    """Four digits that count; thousands apart."""
    if value is None:
        return "–"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{int(value):,}"
