"""The command line: parse, call, print. Data goes to standard output, everything else to standard error."""

import os
import signal
import sys
import time

from hf_moe.cli.app import app
from hf_moe.cli.train import is_main
from hf_moe.errors import HfMoeError

ALONE = 30.0  # seconds after which a process that the launcher has not ended is the only one with its error


def main() -> None:
    """Entry point of `hf-moe`. Exit codes: 0 done, 1 failed, 2 wrong usage, 128 + N ended by signal N."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    try:
        app()
    except HfMoeError as error:
        _tell(error)
        sys.exit(error.exit_code)


def _tell(error: HfMoeError) -> None:
    """Of several processes the first tells what all of them ran into; the launcher then ends the others, which wait
    for it: were one of them gone before, the first would be ended before it has spoken."""
    if is_main():
        print(f"Error: {error}", file=sys.stderr)
        return
    time.sleep(ALONE)
    print(f"Error (rank {os.environ['RANK']}): {error}", file=sys.stderr)


def _end(number: int, frame: object) -> None:
    """Ends as an interrupt does, so that what was half written is taken away."""
    sys.exit(128 + number)
