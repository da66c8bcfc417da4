"""The models: the files beside this one travel inside every checkpoint, so they import only torch, transformers and
each other. This file stays at home."""

from importlib import import_module
from typing import Any

from transformers import PreTrainedModel

from .configuration_bert_moe import BertMoeConfig
from .configuration_dinov2_moe import Dinov2MoeConfig
from .configuration_electra_moe import ElectraMoeConfig
from .configuration_gpt2_moe import GPT2MoeConfig
from .configuration_llama_moe import LlamaMoeConfig
from .configuration_mistral_moe import MistralMoeConfig
from .configuration_moe import MoeConfigMixin
from .configuration_qwen3_moe import Qwen3MoeConfig
from .configuration_roberta_moe import RobertaMoeConfig
from .configuration_vit_moe import ViTMoeConfig
from .configuration_wav2vec2_moe import Wav2Vec2MoeConfig
from .configuration_whisper_moe import WhisperMoeConfig
from .configuration_xlm_roberta_moe import XLMRobertaMoeConfig

_ALL = (
    BertMoeConfig,
    Dinov2MoeConfig,
    ElectraMoeConfig,
    GPT2MoeConfig,
    LlamaMoeConfig,
    MistralMoeConfig,
    Qwen3MoeConfig,
    RobertaMoeConfig,
    ViTMoeConfig,
    Wav2Vec2MoeConfig,
    WhisperMoeConfig,
    XLMRobertaMoeConfig,
)

# Dense `model_type` -> the mixture's configuration.
CONFIGS: dict[str, type[MoeConfigMixin]] = {config.model_type.removesuffix("_moe"): config for config in _ALL}


def modeling_module(config_class: type[MoeConfigMixin]) -> Any:
    """The module with the models of a configuration."""
    return import_module(f".{config_class.modeling_module}", __package__)


def model_class(config_class: type[MoeConfigMixin], name: str) -> type[PreTrainedModel]:
    """One of them by its name."""
    return getattr(modeling_module(config_class), name)
