"""What goes wrong on demand."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

# before: instead of an answer (nothing happens on the Hub); after: it happened, but the answer is lost;
# half: the connection ends in the middle of the body, of whoever sends one.
KINDS = ("status", "drop-before", "drop-after", "drop-half", "slow", "corrupt", "stale", "full", "call")


@dataclass
class Fault:
    """Hits `times` requests whose `METHOD /path` matches `pattern`, after leaving the first `skip` alone."""

    pattern: str
    kind: str
    times: int = 1
    skip: int = 0
    status: int = 500
    seconds: float = 0.5
    call: Callable[[], None] | None = None
    hits: int = field(default=0, init=False)

    def __post_init__(self):
        assert self.kind in KINDS, self.kind

    def strikes(self, request: str) -> bool:
        if self.times <= 0 or not re.search(self.pattern, request):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        self.hits += 1
        return True


def wait(fault: Fault) -> None:
    time.sleep(fault.seconds)


def flip(content: bytes) -> bytes:
    """One bit in the middle is another."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else content
