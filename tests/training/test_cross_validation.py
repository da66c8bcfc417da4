"""`hf-moe cv`: no row, text or group on two sides, nothing fitted to what is held out, and a run that goes on."""

import json
import shutil
from functools import partial

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks import DataSettings
from hf_moe.training import TrainRecipe, train
from hf_moe.training.cross_validation import cross_validate
from hf_moe.training.folds import groups_of, split_rows
from tests.conftest import WORDS
from tests.training.runs import keys_for, write_recipe


def rows(count=24):
    """Texts that differ, two labels, and four authors."""
    return [
        {
            "text": f"{WORDS[n % 15]} {WORDS[n // 15]} sat",
            "label": "ab"[n % 2],
            "author": f"author {n % 4 // 2}{n % 3}",
        }
        for n in range(count)
    ]


@pytest.fixture
def run(hf_moe_command):
    return partial(hf_moe_command, "cv")


@pytest.fixture
def keys(mixture, tmp_path):
    """(rows, …) -> the keys of a recipe of two steps on them."""

    def make(held=None, **more):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in held or rows()))
        given = keys_for("text-classification", mixture("bert"), tmp_path, **more)
        return {**given, "train_file": str(file), "validation_file": None}

    return make


def recorded(recipe, seen):
    """Trains, and keeps what it was given."""
    seen.append(recipe)
    return train(recipe, quiet=True)


def texts(file):
    return set(Dataset.from_parquet(str(file))["text"])


def test_every_row_is_predicted_once_by_a_model_that_has_not_seen_it(keys, run, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", keys())
    code, out, err = run(recipe, "--folds", "3", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert [fold["rows"] for fold in report["folds"]] == [{"train": 16, "test": 8}] * 3
    assert report["splitter"] == "StratifiedKFold"
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(24))
    assert all(line["label"] == rows()[line["row"]]["label"] for line in lines)
    right = sum(line["label"] == line["prediction"] for line in lines)
    assert report["summary"]["accuracy"]["mean"] == pytest.approx(right / 24)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"cv.json", "plan.json", "predictions.jsonl"}
    assert str(tmp_path) not in (tmp_path / "out" / "cv.json").read_text()


def test_the_choice_of_a_checkpoint_is_nested(keys, tmp_path):
    seen = []
    given = keys(
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        metric_for_best_model="f1_macro", early_stopping_patience=1,
    )  # fmt: skip
    recipe = TrainRecipe.from_dict(given)
    sides = []

    def spy(one):
        folder = one.output.parent
        sides.append({split: texts(folder / f"{split}.parquet") for split in ("train", "validation", "test")})
        assert one.data.test_file is None
        assert str(folder / "test.parquet") not in one.to_yaml()
        return recorded(one, seen)

    made = cross_validate(recipe, folds=3, run=spy)
    assert len(seen) == 3
    for part in sides:
        assert sum(map(len, part.values())) == 24
        assert not part["train"] & part["validation"]
        assert not part["test"] & (part["train"] | part["validation"])
    assert [fold["rows"]["validation"] for fold in made.report["folds"]] == [2, 2, 2]


def test_groups_and_equal_texts_never_cross(keys, tmp_path):
    held = rows() + [row | {"author": "someone"} for row in rows()[:6]]  # the same texts by somebody else
    sides = []

    def spy(one):
        folder = one.output.parent
        sides.append(
            {split: list(Dataset.from_parquet(str(folder / f"{split}.parquet"))) for split in ("train", "test")}
        )
        return train(one, quiet=True)

    cross_validate(TrainRecipe.from_dict(keys(held)), folds=2, group_column="author", run=spy)
    for part in sides:
        for column in ("text", "author"):
            assert not {row[column] for row in part["train"]} & {row[column] for row in part["test"]}


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), min_size=4, max_size=30),
    st.integers(2, 4),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=40)
def test_no_cut_tears_what_belongs_together(pairs, folds, seed):
    held = Dataset.from_dict({"text": [f"text {text}" for text, _ in pairs], "by": [f"{by}" for _, by in pairs]})
    groups = groups_of(held, DataSettings(task="causal-lm", train_file="rows.jsonl"), "by")
    for column in ("text", "by"):
        by_value = {}
        for value, group in zip(held[column], groups, strict=True):
            by_value.setdefault(value, set()).add(group)
        assert all(len(own) == 1 for own in by_value.values())
    if len(set(groups)) < folds:
        with pytest.raises(UsageError, match="take fewer folds"):
            split_rows(groups, None, folds=folds, seed=seed)
        return
    parts, _ = split_rows(groups, None, folds=folds, seed=seed)
    assert sorted(row for part in parts for row in part) == list(range(len(pairs)))
    sides = [{groups[row] for row in part} for part in parts]
    assert all(not one & other for i, one in enumerate(sides) for other in sides[:i])


def test_a_recipe_made_for_train_will_do(keys, run, tmp_path):
    """Its rows for validation and test are said to stay aside, and its groups stay together."""
    (tmp_path / "others.jsonl").write_text('{"text": "not one of the rows", "label": "a"}\n')
    others = dict.fromkeys(["validation_file", "test_file"], str(tmp_path / "others.jsonl"))
    recipe = write_recipe(tmp_path / "recipe.yaml", keys() | others | {"group_column": "author"})
    code, out, err = run(recipe, "--folds", "2")
    assert code == 0, err
    note = "Folds are made of the training rows alone, without the recipe's validation_file and test_file."
    assert note in " ".join(err.split())
    assert f"- {note}" in out
    report = json.loads((tmp_path / "out" / "cv.json").read_text())
    assert report["notes"][0] == note
    assert list(report["data"]["files"]) == ["rows.jsonl"]
    assert [sum(fold["rows"].values()) for fold in report["folds"]] == [24, 24]
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    folds = {}
    for line in lines:
        folds.setdefault(rows()[line["row"]]["author"], set()).add(line["fold"])
    assert sorted(line["row"] for line in lines) == list(range(24))
    assert all(len(held) == 1 for held in folds.values())


def test_an_interrupted_run_goes_on(keys, tmp_path):
    recipe, seen = TrainRecipe.from_dict(keys()), []

    def dies(one):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return recorded(one, seen)

    with pytest.raises(KeyboardInterrupt):
        cross_validate(recipe, folds=3, run=dies)
    with pytest.raises(UsageError, match="is an interrupted run of another recipe or data"):
        cross_validate(TrainRecipe.from_dict(keys(learning_rate=0.5)), folds=3)
    again = []
    made = cross_validate(recipe, folds=3, run=partial(recorded, seen=again))
    assert (len(seen), len(again)) == (2, 1)
    whole = made.report
    shutil.rmtree(tmp_path / "out")
    assert cross_validate(recipe, folds=3, run=partial(recorded, seen=[])).report == whole


def test_what_was_done_stays_where_the_model_is_missing(keys, mixture, tmp_path):
    model, away = shutil.copytree(mixture("bert"), tmp_path / "model"), tmp_path / "away"
    recipe, seen = TrainRecipe.from_dict(keys(model_name_or_path=str(model))), []

    def dies(one):
        if seen:
            raise KeyboardInterrupt
        return recorded(one, seen)

    with pytest.raises(KeyboardInterrupt):
        cross_validate(recipe, folds=2, run=dies)
    model.rename(away)
    with pytest.raises(SourceError):
        cross_validate(recipe, folds=2)
    away.rename(model)
    again = []
    cross_validate(recipe, folds=2, run=partial(recorded, seen=again))
    assert len(again) == 1
    model.rename(away)
    with pytest.raises(SourceError):
        cross_validate(recipe, folds=2, overwrite=True)
    assert (tmp_path / "out" / "cv.json").is_file()
    assert not list(tmp_path.glob(".out*"))


def test_numbers_written_as_text_are_a_regression_and_all_rows_are_measured(keys, tmp_path):
    held = [row | {"label": f"{number / 50}"} for number, row in enumerate(rows())]
    recipe = TrainRecipe.from_dict(keys(held, max_eval_samples=2))
    report = cross_validate(recipe, folds=3, run=partial(recorded, seen=[])).report
    assert "mse" in report["summary"]
    assert len((tmp_path / "out" / "predictions.jsonl").read_text().splitlines()) == len(held)


def test_models_stay_if_one_says_so(keys, run, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", keys())
    code, out, err = run(recipe, "--folds", "2", "--keep-models")
    assert code == 0, err
    assert "f1 macro" in out
    assert "it is no standard error" in out
    for number in (1, 2):
        assert (tmp_path / "out" / f"fold-{number}" / "model" / "config.json").is_file()
    code, _, err = run(recipe, "--folds", "2")
    assert code == 2
    assert "exists already; --overwrite replaces it" in err
    assert run(recipe, "--folds", "2", "--overwrite", "-q")[:2] == (0, "")


REFUSED = {
    "one fold": ({}, ["--folds", "1"], "--folds is 1; two or more are needed"),
    "too many folds": ({}, ["--folds", "13"], "the label 'a' has 12 rows, fewer than the 13 folds"),
    "too few groups": ({}, ["--folds", "7", "--group-col", "author"], "There are 6 groups (or different texts) for 7"),
    "no such column": ({}, ["--group-col", "writer"], "has no column 'writer'"),
    "to resume": ({"resume_from_checkpoint": True}, [], "goes on by itself"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_before_anything_is_made(name, keys, run, tmp_path):
    more, options, words = REFUSED[name]
    recipe = write_recipe(tmp_path / "recipe.yaml", keys() | more)
    code, out, err = run(recipe, *options)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_label_of_one_group_alone_is_refused_before_training(keys, run, tmp_path):
    held = [row | {"label": "c" if row["author"] == "author 00" else row["label"]} for row in rows()]
    recipe = write_recipe(tmp_path / "recipe.yaml", keys(held))
    code, out, err = run(recipe, "--folds", "3", "--group-col", "author", "-q")
    assert (code, out) == (2, "")
    assert "has the label 'c', which training lacks" in err
    assert not (tmp_path / "out").exists()
