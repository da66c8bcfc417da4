"""The cards in `model_cards/`: what recipes made, measured against their dense controls.

    python benchmarks/model_cards.py [EXPERIMENT …]

For each experiment of `claims.py`: the default mixture is trained, and so is the dense model, on the same batches and
once more for as many FLOPs (seed 0). All are evaluated on rows they were not trained on, the mixture's routing is
observed on the text of these, and the card is drawn from the files that this leaves. Minutes each; models lie in
`build/corpora/cards`, and one that is there is not trained again.
"""

import argparse
import contextlib
from dataclasses import replace
from pathlib import Path

from claims import EXPERIMENTS, recipe_of
from corpora import FOLDER, fetch
from transformers.utils import logging

from hf_moe.convert.observe import observe
from hf_moe.evaluation import evaluate
from hf_moe.hub import make_card
from hf_moe.tasks import DataSettings
from hf_moe.tasks.read import read_splits
from hf_moe.tasks.settings import SPLITS
from hf_moe.training import train

CARDS = Path(__file__).parents[1].resolve() / "model_cards"
# arm of `claims.py` -> how its model's name ends
ARMS = {"dense": "-dense-control", "dense, as many FLOPs": "-longer-dense-control", "default": ""}
PASSAGES = 200  # that routing is observed on
# experiment -> the model's name, and the rows it is measured on (the test rows of `domains` are of the old domain)
MODELS = {
    "domains": ("english-gpt2-moe-domains", "validation"),
    "ner": ("all-MiniLM-L6-v2-moe-tweet-entities", "test"),
    "rotten-tomatoes": ("all-MiniLM-L6-v2-moe-rotten-tomatoes", "test"),
    "reuters": ("all-MiniLM-L6-v2-moe-reuters-r8", "test"),
}


def make(experiment: str) -> str:
    """The card of an experiment's mixture."""
    name, split = MODELS[experiment]
    folders = {arm: Path("cards") / f"{name}{ending}" for arm, ending in ARMS.items()}
    recipes = {arm: recipe_of(experiment, arm, 0, output_dir=str(folder)) for arm, folder in folders.items()}
    for arm, folder in folders.items():
        if not folder.is_dir():
            train(recipes[arm], quiet=True)
    reports = [Path("cards") / f"{name}-{what}" for what in ("evaluation", "routing")]
    data = recipes["default"].data
    others = {f"{other}_file": None for other in SPLITS if other != split}
    measured = replace(data, **others)
    evaluate(list(folders.values()), measured, split=split, output=reports[0], batch_size=32, overwrite=True)
    text = Path("cards") / f"{experiment}.txt"
    text.write_text("".join(f"{line}\n" for line in passages(measured, split)))
    observe(folders["default"], reports[1], data=[text], overwrite=True)
    return make_card(folders["default"], f"me/{name}", base_model=["none"], reports=reports)


def passages(data: DataSettings, split: str) -> list[str]:
    """The text of the first rows of each file of a split, as many of each."""
    files, made = data.files(split), []
    for file in files:
        rows, _ = read_splits(replace(data, **{f"{split}_file": file}), (split,))
        first = rows[split].select(range(PASSAGES // len(files)))
        made += [row["text"] if "text" in row else " ".join(row["tokens"]) for row in first]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiments", nargs="*", choices=[*MODELS, []])
    logging.set_verbosity_error()
    for experiment in parser.parse_args().experiments or list(MODELS):
        for corpus in EXPERIMENTS[experiment][0]:
            fetch(corpus)
        with contextlib.chdir(FOLDER):
            card = make(experiment)
        (CARDS / f"{MODELS[experiment][0]}.md").write_text(card, encoding="utf-8")
        print(f"model_cards/{MODELS[experiment][0]}.md")


if __name__ == "__main__":
    main()
