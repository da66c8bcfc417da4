"""Conversion at disk speed: ours, mergekit-moe, and what the disk allows, in turn.

    make bench-convert          (or: python benchmarks/convert_speed.py [--runs 3] [--shapes llama gpt2 …])

Random-weight checkpoints in bfloat16 are made on the spot: Llama's shape (2048 hidden, 5632 inner, 22 layers: 1.1 B
parameters; half and twice as many layers show whether memory grows) to 4 experts, GPT-2 XL's to 8. In each round, one
after the other, each a process of its own:

- the limit: `cat` of the finished output's shards into one file, synced; and the same past the page cache (`dd` with
  `oflag=direct`), since on some machines one of the two is several times slower;
- `hf-moe upcycle`, without and with the manifest (sha256 of every file), neither verified;
- `mergekit-moe` (Llama's shape), in an environment of its own that is made in `--mergekit`.

Both are given twice: the whole process, and the conversion alone, without the imports (of mergekit-moe: without what
`--help` takes, which imports the same). The limit is to be held against the conversion alone. Writes
what was measured into `convert_speed.json`.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MERGEKIT = "mergekit==0.1.5"

LLAMA: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32}
LLAMA |= {"num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 2048}
SHAPES: dict[str, dict[str, Any]] = {
    "llama 0.5B": {"class": "Llama", "config": LLAMA | {"num_hidden_layers": 10}, "experts": 4},
    "llama 1.1B": {"class": "Llama", "config": LLAMA | {"num_hidden_layers": 22}, "experts": 4, "mergekit": True},
    "llama 2.2B": {"class": "Llama", "config": LLAMA | {"num_hidden_layers": 46}, "experts": 4},
    "gpt2-xl": {"class": "GPT2", "config": {"n_embd": 1600, "n_layer": 48, "n_head": 25}, "experts": 8},
}

# Only names, shapes and bytes count; the model itself is never built.
MAKE = """
import json, sys, torch, transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
name, values, folder = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
cls = getattr(transformers, name + "Config")
model_class = transformers.LlamaForCausalLM if name == "Llama" else transformers.GPT2LMHeadModel
config = cls(**values)
config.architectures, config.dtype = [model_class.__name__], torch.bfloat16
with torch.device("meta"):
    shapes = {name: tensor.shape for name, tensor in model_class(config).state_dict().items()}
if config.tie_word_embeddings:
    shapes.pop("lm_head.weight", None)
config.save_pretrained(folder)
torch.manual_seed(0)
names, weight_map, size = list(shapes), {}, 0
parts = [names[i::4] for i in range(4)]
for i, part in enumerate(parts):
    file = f"model-{i + 1:05d}-of-00004.safetensors"
    tensors = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in part}
    save_file(tensors, f"{folder}/{file}", metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
Tokenizer(WordLevel({"a": 0}, unk_token="a")).save(f"{folder}/tokenizer.json")  # mergekit-moe wants one
json.dump({"metadata": {}, "weight_map": weight_map}, open(f"{folder}/model.safetensors.index.json", "w"))
"""

OURS = """
import sys, time
import hf_moe
start = time.perf_counter()
hf_moe.upcycle(sys.argv[1], sys.argv[2], num_experts=int(sys.argv[3]), verify=False, manifest=sys.argv[4] == "yes")
print(time.perf_counter() - start)
"""

RECIPE = """
base_model: {dense}
gate_mode: random
dtype: bfloat16
experts_per_token: 2
experts:
""" + "".join(f"  - source_model: {{dense}}\n    positive_prompts: ['{word}']\n" for word in "abcd")


LIMITS = {
    "limit": "cat {shards} > {copy} && sync {copy}",
    "limit, direct": "cat {shards} | dd of={copy} bs=16M iflag=fullblock oflag=direct conv=fsync status=none",
}


def run(*command: str) -> dict[str, float]:
    """Wall seconds and peak resident MB of one process; `inside`: the number it printed, if it did."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        raise RuntimeError(f"exit status {status} of: {' '.join(command)[:300]}\n{printed[-2000:]}")
    found = {"seconds": seconds, "peak_mb": usage.ru_maxrss / 1024}
    with contextlib.suppress(IndexError, ValueError):
        found["inside"] = float(printed.strip().splitlines()[-1])
    return found


def settle() -> None:
    """What one run left to be written must not be paid by the next."""
    os.sync()


def measure(name: str, runs: int, folder: Path, mergekit: Path | None) -> dict[str, Any]:
    shape = SHAPES[name]
    dense, output, peer = folder / "dense", folder / "moe", folder / "mergekit"
    dense.mkdir()
    subprocess.run([sys.executable, "-c", MAKE, shape["class"], json.dumps(shape["config"]), dense], check=True)
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(runs):
        for manifest in ("yes", "no"):
            label = "hf_moe, with manifest" if manifest == "yes" else "hf_moe"
            settle()
            arguments = (str(dense), str(output), str(shape["experts"]), manifest)
            found.setdefault(label, []).append(run(sys.executable, "-c", OURS, *arguments))
            written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
            if manifest == "yes":
                shutil.rmtree(output)
        shards = " ".join(str(file) for file in sorted(output.glob("*.safetensors")))
        copy = folder / "copy"
        for label, command in LIMITS.items():
            settle()
            found.setdefault(label, []).append(run("sh", "-c", command.format(shards=shards, copy=copy)))
            copy.unlink()
        shutil.rmtree(output)
        if mergekit is not None and shape.get("mergekit"):
            recipe = folder / "recipe.yaml"
            recipe.write_text(RECIPE.format(dense=dense))
            settle()
            start = run(str(mergekit), "--help")["seconds"]
            whole = run(str(mergekit), str(recipe), str(peer), "--no-copy-tokenizer")
            found.setdefault("mergekit-moe", []).append({**whole, "inside": whole["seconds"] - start})
            shutil.rmtree(peer)
    shutil.rmtree(dense)
    return {"bytes": written, "runs": runs, **{label: summary(several) for label, several in found.items()}}


def summary(runs: list[dict[str, float]]) -> dict[str, float | list[float]]:
    values: dict[str, float | list[float]] = {}
    for key in runs[0]:
        numbers = [run[key] for run in runs]
        values |= {key: statistics.median(numbers), f"{key}_range": [min(numbers), max(numbers)]}
    return values


def make_mergekit(folder: Path) -> Path:
    """The command, in a virtual environment of its own."""
    if not (folder / "bin" / "mergekit-moe").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        constraints = Path(__file__).parents[1] / "constraints.txt"
        torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, torch, MERGEKIT], check=True)
    return folder / "bin" / "mergekit-moe"


def show(results: dict[str, Any]) -> None:
    table = Table("shape", "", "GB", "seconds", "of it converting", "× limit", "peak MB")
    for name, result in results.items():
        limit = result["limit"]["seconds"]
        for label, values in result.items():
            if not isinstance(values, dict):
                continue
            inside = values.get("inside")
            cells = (f"{values['seconds']:.1f}", f"{inside:.1f}" if inside else "")
            times = (inside or values["seconds"]) / limit
            table.add_row(
                name, label, f"{result['bytes'] / 1e9:.2f}", *cells, f"{times:.2f}", f"{values['peak_mb']:.0f}"
            )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--mergekit", type=Path, default=Path("build/mergekit"), help="its virtual environment")
    parser.add_argument("--without-mergekit", action="store_true")
    arguments = parser.parse_args()
    mergekit = None if arguments.without_mergekit else make_mergekit(arguments.mergekit.absolute())
    results: dict[str, Any] = {}
    for name in arguments.shapes:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            results[name] = measure(name, arguments.runs, Path(folder).absolute(), mergekit)
    show(results)
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
