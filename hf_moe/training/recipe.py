"""A training recipe: one flat mapping, whose keys are the data's, the model's, Trainer's and ours."""

import dataclasses
import difflib
import functools
import logging
from enum import Enum
from pathlib import Path, PurePath
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args, get_origin, get_type_hints

import torch
import yaml
from huggingface_hub.dataclasses import type_validator
from huggingface_hub.errors import StrictDataclassError
from transformers import TrainingArguments

from hf_moe.errors import UsageError
from hf_moe.recipe import Recipe, read_yaml
from hf_moe.tasks import TASKS, DataSettings

from .settings import MethodSettings, ModelSettings

logger = logging.getLogger(__name__)

SECTIONS: dict[str, type] = {
    "data": DataSettings,
    "model": ModelSettings,
    "method": MethodSettings,
    "arguments": TrainingArguments,
}

# What TrainingArguments are here where a recipe does not say; a resolved recipe has all of these.
DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "data_seed": None,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 3.0,
    "max_steps": -1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.0,
    "optim": TrainingArguments.default_optim,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "bf16": False,
    "fp16": False,
    "gradient_checkpointing": False,
    "eval_strategy": "no",
    "save_strategy": "epoch",
    "load_best_model_at_end": False,
    "metric_for_best_model": None,
    "logging_steps": 10,
    "report_to": "none",
}

# Metrics that are better where they are less, by the end of their names; Trainer knows of losses alone.
LESS_IS_BETTER = ("loss", "nll", "perplexity", "bits_per_byte", "brier", "ece", "mse", "mae")

# TrainingArguments that the command decides by itself.
DECIDED = {
    "remove_unused_columns": "the data holds only what the model takes",
    "ignore_data_skip": "a resumed run must see the same rows",
    "restore_callback_states_from_checkpoint": "their states are always restored",
    "local_rank": "the launcher says it",
    **dict.fromkeys(
        [name for name in TrainingArguments.__dataclass_fields__ if name.startswith(("hub_", "push_to_hub"))],
        "publishing is no part of training",
    ),
}

REQUIRED = {
    "task": f"one of {', '.join(TASKS)}",
    "model_name_or_path": "the checkpoint to train",
    "output_dir": "the folder to make",
}


class Key(NamedTuple):
    """Args:
    sections: those of `SECTIONS` that have the key.
    hint: its type.
    """

    sections: list[str]
    hint: Any


@functools.cache
def known_keys() -> dict[str, Key]:
    """Every key that a recipe may have."""
    keys: dict[str, Key] = {}
    for section, settings in SECTIONS.items():
        hints = get_type_hints(settings)
        for field in dataclasses.fields(settings):
            if field.init and field.name not in DECIDED:
                keys.setdefault(field.name, Key([], hints[field.name])).sections.append(section)
    return keys


@dataclasses.dataclass(kw_only=True)
class TrainRecipe(Recipe):
    """A recipe by sections; `flat` has it in one mapping again.

    Args:
        data, model, method: the keys of `DataSettings`, `ModelSettings` and `MethodSettings`.
        arguments: those of `TrainingArguments` that are given or in `DEFAULTS`, as plain values.
    """

    other_names: ClassVar[dict[str, str]] = {
        "activation_checkpointing": "gradient_checkpointing",
        "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
    }

    data: DataSettings
    model: ModelSettings
    method: MethodSettings
    arguments: dict[str, Any]

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Self:
        """Checks names and types; a key with dots (`upcycle.num_experts`) goes into the mapping it names.

        Raises:
            UsageError: for an unknown key (with a suggestion), a missing one, or a value of the wrong type.
        """
        given = _nested(cls.with_our_names(values, where), where)
        keys = known_keys()
        for name in given:
            if name not in keys:
                raise UsageError(f"{where}: unknown key {name!r}; {_suggestion(str(name), keys)}")
        for name, what in REQUIRED.items():
            if given.get(name) is None:
                raise UsageError(f"{where}: names no {name}, {what}.")
        fitted = {name: fit(name, value, keys[name].hint, where) for name, value in given.items()}
        if fitted["task"] not in TASKS:
            raise UsageError(f"{where}: task is {fitted['task']!r}; choose from {', '.join(TASKS)}.")
        parts: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        for name, value in (DEFAULTS | fitted).items():
            for section in keys[name].sections:
                parts[section][name] = value
        if parts["arguments"]["data_seed"] is not None:
            parts["data"]["seed"] = parts["arguments"]["data_seed"]
        return cls(
            data=DataSettings(**parts["data"]),
            model=ModelSettings(**parts["model"]),
            method=MethodSettings(**parts["method"]),
            arguments=parts["arguments"],
        )

    @classmethod
    def from_yaml(cls, file: Path, **overrides: Any) -> Self:
        """Reads `file`; what is given in `overrides` wins. Errors as in `from_dict`, or where it is no mapping."""
        values = cls.with_our_names(read_yaml(file), str(file))
        overrides = cls.with_our_names(overrides, str(file))
        return cls.from_dict({**_nested(values, str(file)), **overrides}, where=str(file))

    @property
    def output(self) -> Path:
        """The folder that is made."""
        return Path(self.arguments["output_dir"]).expanduser()

    def flat(self) -> dict[str, Any]:
        """All keys of the data, the model and the method, and the arguments that are given or by our default; not
        where the run was resumed."""
        made: dict[str, Any] = {}
        for section in (self.data, self.model, self.method):
            made |= dataclasses.asdict(section)
        return {name: value for name, value in (made | self.arguments).items() if name != "resume_from_checkpoint"}

    def to_yaml(self) -> str:
        """The resolved recipe, without paths of this machine: of an absolute one the name is left."""
        return yaml.safe_dump(without_folders(self.flat()), sort_keys=False, allow_unicode=True)

    def training_arguments(self, output_dir: Path, **decided: Any) -> TrainingArguments:
        """Trainer's, for a run that writes to `output_dir`.

        Raises:
            UsageError: where they do not go together.
        """
        values = {name: value for name, value in self.arguments.items() if name != "resume_from_checkpoint"}
        values |= {"output_dir": str(output_dir), "remove_unused_columns": False}
        if not torch.accelerator.is_available():
            values["use_cpu"] = True  # or bf16 is refused, and pinned memory warned of
        if values["metric_for_best_model"] is not None:
            values.setdefault("greater_is_better", not values["metric_for_best_model"].endswith(LESS_IS_BETTER))
        for name in self.other_names:  # Transformers drops the older names some day
            values[name] = values.pop(self.other_names[name], None)
        try:
            arguments = TrainingArguments(**values | decided)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise UsageError(f"recipe: {' '.join(str(error).split())}") from error
        if arguments.n_gpu > 1:
            logger.warning("One device of several is used: start it by `accelerate launch -m hf_moe train …` for all.")
            arguments._n_gpu = 1  # Trainer would copy the model to all of them in every step
        return arguments


def fit(name: str, value: Any, hint: Any, where: str) -> Any:
    """`value` as a field of type `hint` takes it. (YAML reads `1e-4` as text, and `no` as false.)

    Raises:
        UsageError: where it does not.
    """
    parts = _members(hint)
    options = _options(parts)
    if options:
        if value is False and "no" in options:
            value = "no"
        if value not in options and not (value is None and type(None) in parts):
            close = difflib.get_close_matches(str(value), [str(option) for option in options], n=1)
            hint_at = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(map(str, options))}."
            raise UsageError(f"{where}: {name} is {value!r}; {hint_at}")
        return value
    whole = isinstance(value, int) and not isinstance(value, bool) and int not in parts
    if float in parts and str not in parts and (isinstance(value, str) or whole):
        try:
            value = float(value)
        except ValueError:
            raise _wrong_type(name, value, parts, where) from None
    if isinstance(value, bool) and bool not in parts and Any not in parts:
        raise _wrong_type(name, value, parts, where)
    try:
        type_validator(name, value, hint)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise _wrong_type(name, value, parts, where) from error
    return value


def _members(hint: Any) -> tuple[Any, ...]:
    """The types that a hint is a union of; itself where it is none."""
    if get_origin(hint) is Literal or not get_args(hint) or get_origin(hint) in (list, dict, tuple):
        return (hint,)
    return get_args(hint)


def _options(parts: tuple[Any, ...]) -> list[Any]:
    """The values that a type lists, if that is all there are."""
    listed: list[Any] = []
    for part in parts:
        if get_origin(part) is Literal:
            listed += get_args(part)
        elif isinstance(part, type) and issubclass(part, Enum):
            listed += [member.value for member in part]
    free = [part for part in parts if part in (bool, int, float, dict) or get_origin(part) in (list, dict)]
    literal_only = all(get_origin(part) is Literal or part is type(None) for part in parts)
    has_enum = any(isinstance(part, type) and issubclass(part, Enum) for part in parts)
    return listed if listed and not free and (literal_only or has_enum) else []


def _wrong_type(name: str, value: Any, parts: tuple[Any, ...], where: str) -> UsageError:
    words = [getattr(part, "__name__", str(part)) if not get_args(part) else str(part) for part in parts]
    wanted = " or ".join(word for word in words if word != "NoneType")
    return UsageError(f"{where}: {name} is {value!r}, which is no {wanted}.")


def _suggestion(name: str, keys: dict[str, Key]) -> str:
    if name in DECIDED:
        return f"it can't be set: {DECIDED[name]}."
    close = difflib.get_close_matches(name, keys, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return "keys are those of the data, the model and TrainingArguments: see docs/training.md."


def _nested(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`a.b: c` put into the mapping `a`."""
    made = {name: value for name, value in values.items() if "." not in str(name)}
    for name, value in values.items():
        outer, dot, inner = str(name).partition(".")
        if dot:
            held = made.get(outer) or {}
            if not isinstance(held, dict):
                raise UsageError(f"{where}: {outer} is {held!r}, so there is no {name}.")
            made[outer] = {**held, inner: value}
    return made


def without_folders(value: Any) -> Any:
    """Of absolute paths their names: what is published says nothing of the machine it was made on."""
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if isinstance(value, dict):
        return {without_folders(name): without_folders(item) for name, item in value.items()}
    return value
