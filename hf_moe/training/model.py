"""The model of a recipe, with what the recipe says in place of its configuration."""

from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.convert.classes import make_config
from hf_moe.errors import UsageError
from hf_moe.tasks import PreparedData, find_task, load_model

from .distributed import distributed_config
from .settings import ModelSettings

OF_ROUTERS = (
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_entropy_coef",
    "router_jitter_noise",
    "router_bias_update_rate",
    "router_aux_loss_scope",
)


def model_for(settings: ModelSettings, path: str, data: PreparedData, config: PretrainedConfig) -> PreTrainedModel:
    """The checkpoint in `path` with the head that the data needs.

    Raises:
        UsageError, SourceError: where the recipe, the data and the checkpoint do not fit, in one line.
    """
    options: dict[str, Any] = {
        name: value
        for name in ("attn_implementation", "experts_implementation")
        if (value := getattr(settings, name)) is not None
    }
    if settings.distributed is not None:
        options["distributed_config"] = distributed_config(config, **settings.distributed)
    return load_model(
        data.task,
        path,
        labels=data.labels,
        problem_type=data.problem_type,
        revision=settings.revision if path == settings.model_name_or_path else None,
        trust_remote_code=settings.trust_remote_code,
        ignore_mismatched_sizes=settings.ignore_mismatched_sizes,
        config_overrides=overrides(config, settings),
        from_scratch=settings.from_scratch,
        dtype=settings.dtype,
        **options,
    )


def overrides(config: PretrainedConfig, settings: ModelSettings) -> dict[str, Any]:
    """Fields of `config` that the recipe gives other values.

    Raises:
        UsageError: for a field that the configuration does not have, or a value that it refuses.
    """
    made: dict[str, Any] = {}
    if settings.dropout is not None:
        if not 0 <= settings.dropout < 1:
            raise UsageError(f"dropout is {settings.dropout}; it must be at least 0 and below 1.")
        made |= dict.fromkeys(dropouts(config), float(settings.dropout))
    made |= {name: value for name in OF_ROUTERS if (value := getattr(settings, name)) is not None}
    made |= settings.config_overrides or {}
    for name in made:
        if not hasattr(config, name):
            what = "is dense" if name in OF_ROUTERS else f"is of type {config.model_type!r}"
            raise UsageError(f"{name}: the model's configuration has no such field; it {what}.")
    if made:
        make_config(type(config), config.to_dict() | made, UsageError, "recipe")  # or the model could not be saved
    return made


def dropouts(config: PretrainedConfig) -> list[str]:
    """Fields that are the dropout of something; not those that drop whole layers."""
    return [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and (value is None or isinstance(value, float | int))
    ]


def kept_labels(config: PretrainedConfig, task: str, settings: ModelSettings) -> list[str] | None:
    """The labels of a checkpoint that has the task's head already, so that training goes on with them."""
    if settings.ignore_mismatched_sizes or task not in ("text-classification", "token-classification"):
        return None
    mapping = getattr(transformers, find_task(task).auto_class)._model_mapping
    head = mapping[type(config)].__name__ if type(config) in mapping else None
    if head not in (config.architectures or []) or getattr(config, "problem_type", None) == "regression":
        return None
    names: Any = config.id2label
    return [names[number] for number in sorted(names)]
