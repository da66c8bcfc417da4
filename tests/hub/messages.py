"""What goes over the wire, as the tests see it."""

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """What a client sent, and what it got."""

    server: str  # "hub" or "store"
    method: str
    path: str
    query: dict[str, list[str]]
    authorization: str | None
    range: str | None
    received: int  # bytes
    sent: int
    status: int  # 0: none, the connection was dropped

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})
