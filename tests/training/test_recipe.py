"""Recipes: one flat mapping, strictly read."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hf_moe.cli.train import overrides
from hf_moe.errors import UsageError
from hf_moe.training import TrainRecipe
from hf_moe.training.recipe import DECIDED, DEFAULTS, known_keys
from tests.training.runs import keys_for

LEAST = {"task": "causal-lm", "model_name_or_path": "./gpt2", "output_dir": "./out"}


def test_each_key_goes_where_it_belongs():
    recipe = TrainRecipe.from_dict({**LEAST, "train_file": "a.txt", "freeze": "none", "learning_rate": 0.1})
    assert recipe.data.train_file == "a.txt"
    assert recipe.model.model_name_or_path == "./gpt2"
    assert recipe.arguments["learning_rate"] == 0.1
    assert recipe.arguments["logging_steps"] == DEFAULTS["logging_steps"]
    arguments = recipe.training_arguments(recipe.output)
    assert arguments.learning_rate == 0.1
    assert not arguments.remove_unused_columns


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"lerning_rate": 0.1}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"xyzzy": 1}, "unknown key 'xyzzy'; keys are those of"),
        ({"ignore_data_skip": True}, "can't be set: a resumed run must see the same rows"),
        ({"learning_rate": "fast"}, "learning_rate is 'fast', which is no float"),
        ({"max_steps": 1.5}, "max_steps is 1.5, which is no int"),
        ({"max_steps": True}, "max_steps is True, which is no int"),
        ({"bf16": "maybe"}, "bf16 is 'maybe', which is no bool"),
        ({"packing": 1}, "packing is 1, which is no bool"),
        ({"optim": "adamw_torh"}, "optim is 'adamw_torh'; did you mean 'adamw_torch'?"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
        ({"task": "masked"}, "task is 'masked'; choose from masked-lm"),
        ({"task": None}, "names no task, one of"),
        ({"output_dir": None}, "names no output_dir, the folder to make"),
        ({"upcycle": 4}, "upcycle is 4, which is no"),
        ({"dtype.x": 4, "dtype": "auto"}, "dtype is 'auto', so there is no dtype.x"),
        ({"gradient_checkpointing": True, "activation_checkpointing": True}, "gives both"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changed, words):
    with pytest.raises(UsageError) as raised:
        TrainRecipe.from_dict({**LEAST, **changed}, where="recipe.yaml")
    assert words in str(raised.value)
    assert str(raised.value).startswith("recipe.yaml: ")
    assert "\n" not in str(raised.value)


def test_yaml_is_read_as_it_is_meant(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "task: causal-lm\nmodel_name_or_path: ./gpt2\noutput_dir: out\nlearning_rate: 1e-4\nsave_strategy: no\n"
        "eval_strategy: no\nwarmup_steps: 3\nupcycle:\n  num_experts: 4\n"
    )
    recipe = TrainRecipe.from_yaml(file, **{"upcycle.num_experts_per_tok": 1, "max_steps": 7, "weight_decay": 1})
    assert recipe.arguments["learning_rate"] == 1e-4
    assert recipe.arguments["save_strategy"] == "no"
    assert recipe.arguments["max_steps"] == 7
    assert recipe.arguments["weight_decay"] == 1.0
    assert recipe.model.upcycle == {"num_experts": 4, "num_experts_per_tok": 1}
    assert recipe.training_arguments(recipe.output).save_strategy == "no"


def test_the_resolved_recipe_is_a_recipe_and_keeps_paths_to_itself(tmp_path):
    recipe = TrainRecipe.from_dict(keys_for("causal-lm", tmp_path / "gpt2", tmp_path, bf16=True, eval_delay=1))
    text = recipe.to_yaml()
    assert str(tmp_path) not in text
    again = TrainRecipe.from_dict(yaml.safe_load(text))
    assert again.to_yaml() == text
    assert yaml.safe_load(text)["train_file"] == "train.jsonl"
    assert set(DEFAULTS) <= set(yaml.safe_load(text))
    assert yaml.safe_load(text)["eval_delay"] == 1


def test_arguments_that_do_not_go_together_are_one_line():
    recipe = TrainRecipe.from_dict({**LEAST, "load_best_model_at_end": True, "eval_strategy": "steps"})
    with pytest.raises(UsageError) as raised:
        recipe.training_arguments(recipe.output)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("metric", "greater"), [("f1_macro", True), ("nll", False), ("eval_loss", False), ("mse", False)]
)
def test_which_metrics_are_better_where_they_are_less(metric, greater):
    keys = {**LEAST, "metric_for_best_model": metric, "eval_strategy": "epoch"}
    recipe = TrainRecipe.from_dict(keys)
    assert recipe.training_arguments(recipe.output).greater_is_better == greater
    recipe = TrainRecipe.from_dict({**keys, "greater_is_better": not greater})
    assert recipe.training_arguments(recipe.output).greater_is_better != greater


def test_data_seed_is_the_datas():
    assert TrainRecipe.from_dict({**LEAST, "seed": 3}).data.seed == 3
    both = TrainRecipe.from_dict({**LEAST, "seed": 3, "data_seed": 5})
    assert (both.data.seed, both.arguments["seed"]) == (5, 3)


def test_keys_meet_in_no_section_by_accident():
    shared = {name: key.sections for name, key in known_keys().items() if len(key.sections) > 1}
    assert shared == {"seed": ["data", "arguments"], "resume_from_checkpoint": ["method", "arguments"]}
    assert not set(DECIDED) & set(known_keys())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning_rate", "1.0e-4", "--bf16"], {"learning_rate": 1e-4, "bf16": True}),
        (["--learning-rate=0.1", "--max_steps", "-1"], {"learning_rate": 0.1, "max_steps": -1}),
        (["--freeze", "[a, b]", "--run_name="], {"freeze": ["a", "b"], "run_name": None}),
        (["--upcycle.num_experts", "4"], {"upcycle.num_experts": 4}),
    ],
)
def test_options_are_typed_as_yaml(words, expected):
    assert overrides(words) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["learning_rate"], "should be --key VALUE"),
        (["--a", "1", "--a", "2"], "given twice"),
        (["--a", "[1"], "can't be read as YAML"),
        (["--"], "should be --key VALUE"),
    ],
)
def test_options_that_are_none(words, told):
    with pytest.raises(UsageError, match=told):
        overrides(words)


VALUES = st.one_of(st.integers(), st.booleans(), st.none(), st.floats(allow_nan=False), st.text(max_size=8))


@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,8}(\.[a-z]+)?", fullmatch=True), VALUES))
def test_what_is_written_as_yaml_is_read_back(values):
    words = [f"--{name}={yaml.safe_dump(value, default_flow_style=True)}" for name, value in values.items()]
    assert overrides(words) == values
