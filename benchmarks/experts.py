"""How far Transformers' experts implementations are from a naive loop, in outputs and gradients.

    PYTHONPATH=. python benchmarks/experts.py

The naive twin (one token and one expert at a time) is that of the tests; it runs in float64. MiniLM's width (D 384,
F 1536), 8 experts, top 2, 256 tokens, experts with biases and GELU. The largest difference relative to the largest
value, over the output and the gradients of the input, the gates and every weight. Writes `experts.json`.
"""

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_moe.modeling.moe_experts import MoeExperts
from tests.modeling.test_layers import config, fill, naive_experts, outputs_and_gradients


def main() -> None:
    results: dict[str, dict[str, float]] = {}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 384, generator=generator, dtype=torch.float64)
    index = torch.rand(256, 8, generator=generator).argsort(1)[:, :2]
    gates = torch.rand(256, 2, generator=generator, dtype=torch.float64)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = results[str(dtype).removeprefix("torch.")] = {}
        for implementation in ("eager", "batched_mm", "grouped_mm"):
            made = config(implementation, hidden_size=384, moe_intermediate_size=1536, num_experts=8)
            experts = fill(MoeExperts(made, hidden_act="gelu"), torch.float64)
            for parameter in experts.parameters():
                parameter.data *= 0.1
            experts = experts.to(dtype)
            inputs = (x.to(dtype), index, gates.to(torch.promote_types(dtype, torch.float32)))
            got = outputs_and_gradients(experts, experts, *inputs)
            experts = experts.double()
            exact = (inputs[0].double(), index, inputs[2].double())
            wanted = outputs_and_gradients(lambda *a, e=experts: naive_experts(e, *a), experts, *exact)
            found[implementation] = max(
                float((one.double() - other).abs().max() / other.abs().max())
                for one, other in zip(got, wanted, strict=True)
            )
    table = Table("dtype", *next(iter(results.values())), title="largest relative difference from the naive loop")
    for dtype, found in results.items():
        table.add_row(dtype, *(f"{value:.1e}" for value in found.values()))
    Console().print(table)
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
