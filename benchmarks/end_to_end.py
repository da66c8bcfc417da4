"""Whole models, in tokens a second: mixtures against the dense model, and against a native mixture of Transformers.

    python benchmarks/end_to_end.py [--runs 3] [--models bert gpt2]

BERT-base and GPT-2 as mixtures of 8 experts, 2 a token, in every layer, float32, random weights (speed does not ask
for others): forward and training step (forward, backward, SGD) on 8 rows of 128 tokens, and greedy decoding of 32
tokens from a prompt of 16. A mixture computes two feed-forward networks for every token and the dense model one: so
there is a dense model of twice the width too, which computes as much. For GPT-2 there is a Mixtral of the same hidden
size, layers and active parameters. In each round everything runs once, in turn; medians. Writes `end_to_end.json`.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from hf_moe import BertMoeConfig, BertMoeForMaskedLM, GPT2MoeConfig, GPT2MoeLMHeadModel

ROWS, LENGTH, PROMPT, NEW_TOKENS = 8, 128, 16, 32
WIDTH = 3072

MODELS: dict[str, dict[str, Callable[[], PreTrainedModel]]] = {
    "bert": {
        "dense": lambda: BertForMaskedLM(BertConfig()),
        "dense, twice the width": lambda: BertForMaskedLM(BertConfig(intermediate_size=2 * WIDTH)),
        "hf_moe": lambda: BertMoeForMaskedLM(BertMoeConfig()),
    },
    "gpt2": {
        "dense": lambda: GPT2LMHeadModel(GPT2Config()),
        "dense, twice the width": lambda: GPT2LMHeadModel(GPT2Config(n_inner=2 * WIDTH)),
        "hf_moe": lambda: GPT2MoeLMHeadModel(GPT2MoeConfig()),
        # three matrices an expert for two, so two thirds of the width
        "Mixtral": lambda: MixtralForCausalLM(
            MixtralConfig(
                vocab_size=50257,
                hidden_size=768,
                intermediate_size=WIDTH * 2 // 3,
                num_hidden_layers=12,
                num_attention_heads=12,
                num_key_value_heads=12,
                tie_word_embeddings=True,
            )
        ),
    },
}


def forward(model: PreTrainedModel, ids: torch.Tensor) -> int:
    with torch.no_grad():
        model.eval()(input_ids=ids)
    return ids.numel()


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> int:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return ids.numel()


def decoding(model: PreTrainedModel, ids: torch.Tensor) -> int:
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    prompt = ids[:1, :PROMPT]
    model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=settings)  # type: ignore
    return NEW_TOKENS


def measure(makers: dict[str, Callable[[], PreTrainedModel]], runs: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(0)
    models = {name: make() for name, make in makers.items()}
    ids = torch.randint(5, 30000, (ROWS, LENGTH))
    modes = [forward, training_step] + ([decoding] if models["dense"].can_generate() else [])
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for mode in modes:
        speeds: dict[str, list[float]] = {name: [] for name in models}
        for run in range(runs + 1):
            for name, model in models.items():
                start = time.perf_counter()
                tokens = mode(model, ids)
                if run:  # the first is for warming up
                    speeds[name].append(tokens / (time.perf_counter() - start))
        for name, values in speeds.items():
            found[name][mode.__name__] = statistics.median(values)
    for name, model in models.items():
        found[name]["parameters"] = model.num_parameters()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    results: dict[str, Any] = {}
    table = Table("", "", "parameters", "forward", "training_step", "decoding", title="tokens a second")
    for name in arguments.models:
        results[name] = measure(MODELS[name], arguments.runs)
        gc.collect()
        for model, found in results[name].items():
            speeds = [
                f"{found[mode]:.1f}" if mode in found else "" for mode in ("forward", "training_step", "decoding")
            ]
            table.add_row(name, model, f"{found['parameters'] / 1e6:.0f} M", *speeds)
    Console().print(table)
    file = Path(__file__).with_suffix(".json")
    known = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(known | results, indent=2) + "\n")


if __name__ == "__main__":
    main()
