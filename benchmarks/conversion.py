"""Time and peak memory of a conversion, beside the same done in memory with Transformers.

    python benchmarks/conversion.py [--runs 5]

A BERT-base (110M parameters, random weights, float32) becomes a mixture of 8 experts. Both ways run in turn, each in a
process of its own, without verification: ours streams from file to file; the other loads the model, stacks the
experts' weights and saves the model. Writes `conversion.json` and prints the medians.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

OURS = "import sys, hf_moe; hf_moe.upcycle(sys.argv[1], sys.argv[2], verify=False)"
IN_MEMORY = """
import sys, torch, hf_moe
from transformers import BertForMaskedLM
dense = BertForMaskedLM.from_pretrained(sys.argv[1])
values = {k: v for k, v in dense.config.to_dict().items() if k not in ("model_type", "architectures")}
config = hf_moe.BertMoeConfig(**values)
moe = hf_moe.BertMoeForMaskedLM(config)
moe.load_state_dict(dense.state_dict(), strict=False)
with torch.no_grad():
    for one, other in zip(dense.bert.encoder.layer, moe.bert.encoder.layer):
        experts = other.mlp.experts
        experts.up_proj[:], experts.up_proj_bias[:] = one.intermediate.dense.weight, one.intermediate.dense.bias
        experts.down_proj[:], experts.down_proj_bias[:] = one.output.dense.weight, one.output.dense.bias
moe.save_pretrained(sys.argv[2])
"""
IMPORTS = "import hf_moe"
MAKE = """
import sys
from transformers import BertConfig, BertForMaskedLM
BertForMaskedLM(BertConfig()).save_pretrained(sys.argv[1])
"""


def measure(code: str, *arguments: str) -> dict[str, float]:
    """Wall seconds and peak resident MB of one process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"exit status {status} of: {code}")
    return {"seconds": time.perf_counter() - start, "peak_mb": usage.ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    found: dict[str, list[dict[str, float]]] = {"imports alone": [], "hf-moe upcycle": [], "in memory": []}
    with tempfile.TemporaryDirectory() as folder:
        dense, moe = str(Path(folder) / "dense"), str(Path(folder) / "moe")
        measure(MAKE, dense)
        for _ in range(runs):
            found["imports alone"].append(measure(IMPORTS))
            for name, code in (("hf-moe upcycle", OURS), ("in memory", IN_MEMORY)):
                found[name].append(measure(code, dense, moe))
                written = sum(file.stat().st_size for file in Path(moe).glob("*.safetensors"))
                shutil.rmtree(moe)
    results = {
        name: {key: statistics.median(run[key] for run in measured) for key in measured[0]}
        | {f"{key}_range": [min(r[key] for r in measured), max(r[key] for r in measured)] for key in measured[0]}
        for name, measured in found.items()
    }
    table = Table(
        "", "seconds", "peak MB", title=f"BERT-base to 8 experts, {written / 1e9:.2f} GB written, {runs} runs"
    )
    for name, result in results.items():
        table.add_row(name, f"{result['seconds']:.1f}", f"{result['peak_mb']:.0f}")
    Console().print(table)
    Path(__file__).with_suffix(".json").write_text(json.dumps({"bytes": written, **results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
