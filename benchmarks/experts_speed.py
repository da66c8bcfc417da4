"""How fast the experts run: against a dense layer of as many operations, and Transformers' own implementations.

    python benchmarks/experts_speed.py [--shapes base …] [--tokens 1 2048 …] [--dtypes float32 …] [--runs 7]

One layer's experts on T tokens, each sent to K of E. The limit is a dense layer on T·K rows, which are as many
operations; for T = 1 one of K times the width, so that as many bytes of weights are read. In each round everything
runs once, in turn; the fraction is of the medians. `training` is forward and backward, of the input, the gates and all
weights. The tokens' experts are drawn anew each round, as they change from batch to batch. Writes what was measured
into `experts_speed.json`, under the machine's name.

`batched_mm` copies the weights of every assignment, and is left out where that takes more than 256 MB.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import nn
from transformers.activations import ACT2FN

from hf_moe import BertMoeConfig
from hf_moe.modeling.moe_experts import MoeExperts

IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm", "sorted_mm")
TOKENS = (1, 16, 128, 2048, 8192)
MAX_COPIED = 2**28
SECONDS = 15  # that one row of the table may take: fewer runs where it would be more


@dataclass(frozen=True)
class Shape:
    D: int
    F: int
    E: int = 8
    K: int = 2
    hidden_act: str = "gelu"
    gated: bool = False
    bias: bool = True


SHAPES = {
    "MiniLM": Shape(384, 1536),
    "BERT-base": Shape(768, 3072),
    "GPT-2": Shape(768, 3072, hidden_act="gelu_new"),
    "SmolLM": Shape(576, 1536, hidden_act="silu", gated=True, bias=False),
    "granular": Shape(768, 768, E=32, K=8),
}


class Dense(nn.Module):
    """A feed-forward network of width F; its input has as many rows as the limit asks for."""

    def __init__(self, shape: Shape, width: int):
        super().__init__()
        self.gated = shape.gated
        self.up = nn.Linear(shape.D, 2 * width if shape.gated else width, bias=shape.bias)
        self.down = nn.Linear(width, shape.D, bias=shape.bias)
        self.act = ACT2FN[shape.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.up(x)
        if self.gated:
            gate, up = h.chunk(2, dim=-1)
            return self.down(self.act(gate) * up)
        return self.down(self.act(h))


def make_experts(shape: Shape, implementation: str) -> MoeExperts:
    config = BertMoeConfig(
        hidden_size=shape.D, moe_intermediate_size=shape.F, num_experts=shape.E, num_experts_per_tok=shape.K
    )
    config._experts_implementation = implementation
    experts = MoeExperts(config, hidden_act=shape.hidden_act, gated=shape.gated, bias=shape.bias)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.02)
    return experts


def contenders(
    shape: Shape, tokens: int, dtype: torch.dtype, device: str
) -> tuple[dict[str, Callable[[], tuple]], Callable[[], None]]:
    """Name -> makes this round's call (the module, its inputs, and the gradient of its output); and what draws the
    tokens' experts anew."""
    rows = 1 if tokens == 1 else tokens * shape.K
    dense = Dense(shape, shape.F * shape.K if tokens == 1 else shape.F).to(device, dtype)
    copied = tokens * shape.K * (3 if shape.gated else 2) * shape.F * shape.D * dtype.itemsize
    names = [name for name in IMPLEMENTATIONS if name != "batched_mm" or copied <= MAX_COPIED]
    modules: dict[str, nn.Module] = {name: make_experts(shape, name).to(device, dtype) for name in names}
    index = torch.empty(0)

    def inputs(name: str) -> tuple:
        if name == "dense":
            x = torch.randn(rows, shape.D, device=device, dtype=dtype, requires_grad=True)
            return dense, (x,), torch.ones_like(x)
        x = torch.randn(tokens, shape.D, device=device, dtype=dtype, requires_grad=True)
        gates = torch.rand(tokens, shape.K, device=device, requires_grad=True)
        return modules[name], (x, index, gates), torch.ones_like(x)

    def redraw() -> None:
        nonlocal index
        index = torch.rand(tokens, shape.E, device=device).argsort(1)[:, : shape.K]

    made: dict[str, Any] = {name: lambda name=name: inputs(name) for name in ("dense", *modules)}
    return made, redraw


def seconds(call: tuple, training: bool) -> float:
    module, inputs, gradient = call
    module.zero_grad()
    wait = torch.cuda.synchronize if gradient.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    with torch.set_grad_enabled(training):
        output = module(*inputs)
    if training:
        output.backward(gradient)
    wait()
    return time.perf_counter() - start


def measure(shape: Shape, tokens: int, dtype: torch.dtype, training: bool, runs: int, device: str) -> dict[str, float]:
    calls, redraw = contenders(shape, tokens, dtype, device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for run in range(runs + 1):
        redraw()
        for name, call in calls.items():
            taken = seconds(call(), training)
            if run:  # the first is for warming up
                times[name].append(taken)
        if run >= 2 and time.perf_counter() - start > SECONDS:
            break
    return {name: statistics.median(values) for name, values in times.items()}


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    name = names[0].partition(": ")[2] if names else platform.processor()
    return f"{name}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"


def show(rows: list[dict[str, Any]]) -> None:
    title = "fraction of the dense layer's speed"
    table = Table("shape", "dtype", "T", "mode", "dense ms", *IMPLEMENTATIONS, title=title)
    for row in rows:
        dense = row["seconds"]["dense"]
        cells = [f"{dense / row['seconds'][name]:.2f}" if name in row["seconds"] else "" for name in IMPLEMENTATIONS]
        table.add_row(row["shape"], row["dtype"], str(row["tokens"]), row["mode"], f"{1e3 * dense:.2f}", *cells)
    Console(width=110).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--runs", type=int, default=7)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cases = [
        (name, dtype, tokens, mode)
        for name in arguments.shapes
        for dtype in arguments.dtypes
        for tokens in arguments.tokens
        for mode in ("forward", "training")
    ]
    rows = []
    for name, dtype, tokens, mode in track(cases, transient=True):
        runs = arguments.runs * (20 if tokens <= 16 else 1)
        found = measure(SHAPES[name], tokens, getattr(torch, dtype), mode == "training", runs, device)
        rows.append({"shape": name, "dtype": dtype, "tokens": tokens, "mode": mode, "seconds": found})
    show(rows)
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    measured = {f"{row['shape']} {row['dtype']} T={row['tokens']} {row['mode']}": row["seconds"] for row in rows}
    known[machine(device)] = known.get(machine(device), {}) | measured
    file.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
