"""A mixture beside its dense model, and processes that can't import hf_moe."""

import json
import os
import subprocess
import sys

import pytest

import hf_moe

WITHOUT = "import json, sys; sys.modules['hf_moe'] = None\n"


def alone(code, *arguments, cwd):
    """What `code` prints as JSON, in a clean process without a network."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT + code, *map(str, arguments)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(cwd / "modules")},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def pair(dense_folder, tmp_path_factory):
    """(family, head) -> a dense folder and its mixture."""
    made = {}

    def make(family, head=None, **how):
        key = (family, head, *how.values())
        if key not in made:
            dense = dense_folder(family, head)
            output = tmp_path_factory.mktemp("serving") / "moe"
            made[key] = dense, hf_moe.upcycle(dense, output, num_experts=4, verify=False, **how).path
        return made[key]

    return make
