"""Which family a checkpoint belongs to, and which classes stand for it before and after."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import HfMoeError, SourceError
from hf_moe.modeling import modeling_module

from .checkpoint import Checkpoint
from .families import FAMILIES, Family
from .quiet import quiet

# Marks of a configuration that describes a mixture already.
MOE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

TWO_STACKS = (
    "it has two stacks of layers that see different tokens, where tables, the router's losses and certificates know "
    "one. Its feed-forward networks are gated or not as config.json says, where a table says it once; start from an "
    "encoder or a decoder"
)

# Why a well-known architecture can't be converted; the rest only lack a table.
WHY_NOT = {
    "transfo-xl": "it left Transformers with version 5; for long context start from ModernBERT",
    "t5": TWO_STACKS,
    "mt5": TWO_STACKS,
    "mamba": "it has no feed-forward network to replace",
}


def find_family(checkpoint: Checkpoint) -> Family:
    """The dense family of a checkpoint, in the form that its configuration asks for.

    Raises:
        SourceError: where it asks for remote code, is a mixture already, is quantized, has no table, or is of a form
            that its table refuses.
    """
    config, path = checkpoint.config, checkpoint.path
    model_type = config.get("model_type")
    if any(str(model_type) == family.config_class.model_type for family in FAMILIES.values()) or any(
        isinstance(config.get(name), int) and config[name] > 1 for name in MOE_FIELDS
    ):
        raise SourceError(
            f"{path}: is a mixture of experts already (model_type {model_type!r}); start from a dense one."
        )
    if config.get("auto_map"):
        raise SourceError(f"{path}: config.json asks for remote code (auto_map), which is never run here.")
    if config.get("quantization_config"):
        raise SourceError(f"{path}: is quantized; start from the unquantized checkpoint.")
    if model_type not in FAMILIES:
        why = WHY_NOT.get(str(model_type), "no table says where its feed-forward networks lie")
        known = ", ".join(FAMILIES)
        raise SourceError(f"{path}: architecture {model_type!r} can't be converted: {why}. Known are {known}.")
    family = FAMILIES[model_type]
    for name, why in family.refused.items():
        if config.get(name):
            raise SourceError(f"{path}: config.json sets {name}, which can't be converted: {why}.")
    return variant_of(family, config)


def variant_of(family: Family, config: dict[str, Any]) -> Family:
    """The family's table as the model of this `config.json` has it."""
    for (name, value), changes in family.variants.items():
        if config.get(name) is value:
            family = replace(family, **changes)  # type: ignore[arg-type]
    return family


def dense_class_of(moe_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class that a mixture's class is made of."""
    return moe_class.__bases__[1]


def sister_name(model_class: type[PreTrainedModel], config_class: type[PretrainedConfig]) -> str:
    """The name that `model_class`'s head has in the family of `config_class`."""
    configs: tuple[Any, Any] = (model_class.config_class, config_class)
    old, new = (cls.__name__.removesuffix("Config") for cls in configs)
    return new + model_class.__name__.removeprefix(old)


def moe_classes(family: Family) -> dict[str, type[PreTrainedModel]]:
    """Name of each dense class of the family -> the mixture's class."""
    module = modeling_module(family.config_class)
    classes = [getattr(module, name) for name in module.__all__]
    return {dense_class_of(cls).__name__: cls for cls in classes if "forward" in vars(cls)}


def find_classes(checkpoint: Checkpoint, family: Family) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The dense class that a checkpoint names, and the mixture's; the bodies, if it names none or has a decoder."""
    known = moe_classes(family)
    body = body_classes(family)[0].__name__
    architectures = checkpoint.config.get("architectures") or [body]
    if not isinstance(architectures, list) or architectures[0] not in {*known, *family.encoder_of}:
        raise SourceError(
            f"{checkpoint.path}: config.json names the class {architectures!r}; known for {family.model_type} are "
            f"{', '.join(sorted([*known, *family.encoder_of]))}."
        )
    moe_class = known.get(architectures[0], known[body])
    return dense_class_of(moe_class), moe_class


def body_classes(family: Family) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The family's dense class without a head, and the mixture's."""
    moe_name = family.config_class.auto_classes["AutoModel"]
    moe_class = next(cls for cls in moe_classes(family).values() if cls.__name__ == moe_name)
    return dense_class_of(moe_class), moe_class


def name_of_body(family: Family, dense_class: type[PreTrainedModel]) -> str:
    """What heads call their body."""
    return family.body or dense_class.base_model_prefix


def body_prefix(family: Family, dense_class: type[PreTrainedModel], names: Iterable[str]) -> str:
    """What stands before the body's tensors among the `names` of a class's: nothing where the class is the body
    itself, or has the body's parts for its own, as backbones do."""
    prefix = f"{name_of_body(family, dense_class)}."
    return prefix if any(name.startswith(prefix) for name in names) else ""


def body_of(family: Family, model: PreTrainedModel) -> torch.nn.Module:
    """The body of a dense model or a mixture."""
    return getattr(model, name_of_body(family, type(model)), model)


def make_config(
    config_class: type[PretrainedConfig], values: dict[str, Any], kind: type[HfMoeError], where: str
) -> PretrainedConfig:
    """A configuration of `values`; what it refuses is raised as a `kind` that begins with `where`."""
    try:
        with quiet():
            return config_class.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise kind(f"{where}: {reason}") from error
