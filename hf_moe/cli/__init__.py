"""The command line: parse, call, print. Data goes to standard output, everything else to standard error."""

import sys

from hf_moe.cli.app import app
from hf_moe.errors import HfMoeError


def main() -> None:
    """Entry point of `hf-moe`. Exit codes: 0 done, 1 failed, 2 wrong usage."""
    try:
        app()
    except HfMoeError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrupted; nothing was left behind.", file=sys.stderr)
        sys.exit(1)
