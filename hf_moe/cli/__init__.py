"""The command line: parse, call, print. Data goes to standard output, everything else to standard error."""

import signal
import sys

from hf_moe.cli.app import app
from hf_moe.errors import HfMoeError


def main() -> None:
    """Entry point of `hf-moe`. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + N ended by signal N."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        app()
    except HfMoeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


def _end(number: int, frame: object) -> None:
    """Ends as an interrupt does, so that what was half written is taken away."""
    sys.exit(128 + number)
