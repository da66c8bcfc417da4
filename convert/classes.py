"""Which family a checkpoint belongs to, and which classes stand for it before and after."""

from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import HfMoeError, SourceError
from hf_moe.modeling import modeling_module

from .checkpoint import Checkpoint
from .families import FAMILIES, Family
from .quiet import quiet

# Marks of a configuration that describes a mixture already.
MOE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Why a well-known architecture can't be converted; the rest only lack a table.
WHY_NOT = {
    "transfo-xl": "it left Transformers with version 5; for long context start from ModernBERT",
    "mamba": "it has no feed-forward network to replace",
}


def find_family(checkpoint: Checkpoint) -> Family:
    """The dense family of a checkpoint.

    Raises:
        SourceError: where it asks for remote code, is a mixture already, is quantized, or has no table.
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
    return FAMILIES[model_type]


def moe_classes(family: Family) -> dict[str, type[PreTrainedModel]]:
    """Name of each dense class of the family -> the mixture's class."""
    module = modeling_module(family.config_class)
    classes = [getattr(module, name) for name in module.__all__]
    return {cls.__bases__[1].__name__: cls for cls in classes if "forward" in vars(cls)}


def find_classes(checkpoint: Checkpoint, family: Family) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The dense class that a checkpoint names (its body, if it names none), and the mixture's."""
    known = moe_classes(family)
    architectures = checkpoint.config.get("architectures") or [body_name(family)]
    if not isinstance(architectures, list) or architectures[0] not in known:
        raise SourceError(
            f"{checkpoint.path}: config.json names the class {architectures!r}; known for {family.model_type} are "
            f"{', '.join(sorted(known))}."
        )
    return getattr(transformers, architectures[0]), known[architectures[0]]


def body_name(family: Family) -> str:
    """Name of the family's dense class without a head."""
    moe_name = family.config_class.auto_classes["AutoModel"]
    return next(name for name, cls in moe_classes(family).items() if cls.__name__ == moe_name)


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
