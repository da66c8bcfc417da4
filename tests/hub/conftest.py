"""A Hub, and clients in clean processes of their own: the environment must stand before the client is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.server import Hub

# Retries wait for seconds; here they need not.
AT_ONCE = """
import types, huggingface_hub.utils._http as http
http.time = types.SimpleNamespace(**{**vars(http.time), "sleep": lambda seconds: None})
"""


@pytest.fixture
def hub(tmp_path):
    with Hub(tmp_path / "hub") as running:
        yield running


@pytest.fixture
def client(hub, tmp_path):
    """Runs Python in a clean process that talks to `hub` -> what it printed.

    `client(code, *arguments, token=…, home=…, bare=True, ok=False)`: `bare` for a process that has no hf_moe.
    """

    def run(code: str, *arguments, token="token-of-ann", home=None, bare=False, ok=True, at: Hub = hub):
        where = tmp_path / "elsewhere"
        where.mkdir(exist_ok=True)
        prelude = AT_ONCE + ("import sys; sys.modules['hf_moe'] = None\n" if bare else "")
        done = subprocess.run(
            [sys.executable, "-c", prelude + code, *map(str, arguments)],
            env={**os.environ, **at.environment(Path(home or tmp_path / f"home-{token}"), token)},
            cwd=where,
            capture_output=True,
            text=True,
        )
        if ok:
            assert done.returncode == 0, done.stderr
            return done.stdout
        return done

    return run
