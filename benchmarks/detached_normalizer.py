"""Whether gates should be divided by a sum without gradient (`router_detach_normalizer`), so that a router of equal
experts learns from the first step.

    python benchmarks/detached_normalizer.py [--seeds 5]

For each seed a byte-level GPT-2 of two layers is trained on the source of Python's standard library, becomes a
mixture of copies (8 experts, top 2), and is trained on: with the plain normaliser, with the detached one, with routers
that never learn, and, as a control, as the dense model that it was. All four see the same batches. Writes
`detached_normalizer.json` and prints a table: mean held-out loss (nats a byte) ± standard deviation over seeds, and
the same of its difference from the plain normaliser's, seed by seed.
"""

import argparse
import importlib.util
import json
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers.utils import logging

import hf_moe
from hf_moe.modeling.moe_routers import TopKRouter
from hf_moe.routing import gather

MODULES = ["argparse", "ast", "datetime", "decimal", "doctest", "inspect", "pdb", "pickle", "pydoc", "tarfile"]
MODULES += ["threading", "turtle", "typing", "zipfile"]
ROWS, LENGTH, EXPERTS, TOP_K = 16, 64, 8, 2
PLAIN = "plain normaliser (default)"


def text() -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes to train on, and the last tenth of each module, held out."""
    specs = [importlib.util.find_spec(name) for name in MODULES]
    files = [Path(str(spec.origin)) for spec in specs if spec is not None and str(spec.origin).endswith(".py")]
    parts = [torch.tensor(list(file.read_bytes())) for file in files]
    cuts = [len(part) * 9 // 10 for part in parts]
    return (
        torch.cat([part[:cut] for part, cut in zip(parts, cuts, strict=True)]),
        torch.cat([part[cut:] for part, cut in zip(parts, cuts, strict=True)]),
    )


def batch(ids: torch.Tensor, rows: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, LENGTH) from random places."""
    starts = torch.randint(len(ids) - LENGTH, (rows,), generator=generator)
    return torch.stack([ids[start : start + LENGTH] for start in starts])


def train(model: PreTrainedModel, ids: torch.Tensor, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model.train()
    for _ in range(steps):
        rows = batch(ids, ROWS, generator)
        model(rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(model: PreTrainedModel, ids: torch.Tensor) -> float:
    rows = batch(ids, 512, torch.Generator().manual_seed(0))
    return sum(model(part, labels=part).loss.item() for part in rows.split(64)) / 8


def router_gradient(model: PreTrainedModel, ids: torch.Tensor) -> float:
    """Norm of the task's gradient on the routers at the start, without the balancing loss."""
    rows = batch(ids, ROWS, torch.Generator().manual_seed(1))
    model.eval()(rows, labels=rows).loss.backward()
    grads = [m.weight.grad.norm() for m in model.modules() if isinstance(m, TopKRouter) and m.weight.grad is not None]
    model.zero_grad()
    return torch.stack(grads).norm().item() if grads else 0.0


def frozen(folder: Path) -> PreTrainedModel:
    model = hf_moe.GPT2MoeLMHeadModel.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, TopKRouter):
            module.requires_grad_(False)
    return model


# arm -> the model it trains, from the folders of mixture and dense model
ARMS: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    PLAIN: lambda moe, dense: hf_moe.GPT2MoeLMHeadModel.from_pretrained(moe),
    "detached normaliser": lambda moe, dense: hf_moe.GPT2MoeLMHeadModel.from_pretrained(
        moe, router_detach_normalizer=True
    ),
    "routers frozen": lambda moe, dense: frozen(moe),
    "dense (control)": lambda moe, dense: GPT2LMHeadModel.from_pretrained(dense),
}


def run(seed: int, steps: int, folder: Path) -> dict[str, dict[str, float]]:
    """One seed: arm -> what was measured."""
    ids, other = text()
    torch.manual_seed(seed)
    sizes = {"vocab_size": 256, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    dense = GPT2LMHeadModel(config)
    train(dense, ids, steps, seed)
    dense.save_pretrained(folder / "dense")
    hf_moe.upcycle(
        folder / "dense", folder / "moe", num_experts=EXPERTS, num_experts_per_tok=TOP_K, seed=seed, verify=False
    )
    rows = batch(other, 64, torch.Generator().manual_seed(2))
    measured = {}
    for name, make in ARMS.items():
        model = make(folder / "moe", folder / "dense")
        start, gradient = held_out(model, other), router_gradient(model, ids)
        torch.manual_seed(seed)
        train(model, ids, steps, seed + 1000)
        load = 0.0 if name.startswith("dense") else gather(model, [{"input_ids": rows}]).load.max().item()
        measured[name] = {
            "loss before": start,
            "loss": held_out(model, other),
            "router gradient at step 0": gradient,
            "largest share": load,
        }
    return measured


def spread(values: list[float]) -> dict[str, float]:
    tensor = torch.tensor(values, dtype=torch.float64)
    return {"mean": tensor.mean().item(), "sd": tensor.std().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    runs = []
    for seed in range(arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(run(seed, arguments.steps, Path(folder)))
    results = {
        name: {
            **{key: spread([one[name][key] for one in runs]) for key in runs[0][name]},
            "loss less the default's": spread([one[name]["loss"] - one[PLAIN]["loss"] for one in runs]),
        }
        for name in ARMS
    }
    table = Table(
        "arm", *results[PLAIN], title=f"{arguments.seeds} seeds, {arguments.steps} + {arguments.steps} steps"
    )
    for name, result in results.items():
        table.add_row(name, *(f"{value['mean']:.4f} ± {value['sd']:.4f}" for value in result.values()))
    Console(width=160).print(table)
    difference = results["detached normaliser"]["loss less the default's"]
    error = difference["sd"] / arguments.seeds**0.5
    clear = abs(difference["mean"]) > 2 * error
    verdict = "a tie" if not clear else "detached is better" if difference["mean"] < 0 else "detached is worse"
    print(f"detached less default: {difference['mean']:+.4f} ± {error:.4f} (standard error): {verdict}")
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    report = {"seeds": arguments.seeds, "steps": arguments.steps, "verdict": verdict, "arms": results}
    report |= {"standard error": error, "runs": runs, "versions": versions}
    Path(__file__).with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
