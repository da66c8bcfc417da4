"""Small data and recipes for runs of a second."""

import json
import random

import yaml

from hf_moe.training import TrainRecipe

NOUNS = ["dog", "cat", "law", "god", "nation", "people", "earth"]
TIMES = ("tokens_per_second", "_runtime", "_per_second", "_preparation_time")


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choice([*NOUNS, "the", "a", "sat", "on", "mat", "free"]) for _ in range(rng.randint(4, 12)))


def rows_for(task: str, rng: random.Random) -> dict:
    text = sentence(rng)
    if task in ("masked-lm", "causal-lm"):
        return {"text": text}
    if task == "text-classification":
        return {"text": text, "label": "law" if "law" in text else "other"}
    if task == "token-classification":
        words = text.split()
        return {"tokens": words, "tags": ["B-X" if word in NOUNS else "O" for word in words]}
    if task == "question-answering":
        context = f"the {text}"
        return {"question": "the dog", "context": context, "answers": {"text": ["the"], "answer_start": [0]}}
    return {"anchor": text, "positive": f"{text} mat"}


def write_rows(file, task: str, count: int = 24, seed: int = 0):
    rng = random.Random(seed)
    file.write_text("".join(json.dumps(rows_for(task, rng)) + "\n" for _ in range(count)))
    return str(file)


def keys_for(task: str, model, folder, **keys) -> dict:
    """A recipe of two steps on rows made in `folder`."""
    return {
        "task": task,
        "model_name_or_path": str(model),
        "output_dir": str(folder / "out"),
        "train_file": write_rows(folder / "train.jsonl", task),
        "validation_file": write_rows(folder / "validation.jsonl", task, 6, seed=1),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        **({"doc_stride": 4} if task == "question-answering" else {}),
        **keys,
    }


def recipe_for(task: str, model, folder, **keys) -> TrainRecipe:
    return TrainRecipe.from_dict(keys_for(task, model, folder, **keys))


def write_recipe(file, keys: dict):
    file.write_text(yaml.safe_dump(keys))
    return file


def without_times(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in history]
