"""The models: the files beside this one travel inside every checkpoint, so they import only torch, transformers and
each other. This file stays at home."""

from importlib import import_module
from typing import Any

from transformers import PreTrainedModel

from .configuration_bert_moe import BertMoeConfig
from .configuration_dinov2_moe import Dinov2MoeConfig
from .configuration_distilbert_moe import DistilBertMoeConfig
from .configuration_electra_moe import ElectraMoeConfig
from .configuration_gemma2_moe import Gemma2MoeConfig
from .configuration_gemma3_text_moe import Gemma3TextMoeConfig
from .configuration_gpt2_moe import GPT2MoeConfig
from .configuration_gpt_neo_moe import GPTNeoMoeConfig
from .configuration_gpt_neox_moe import GPTNeoXMoeConfig
from .configuration_gptj_moe import GPTJMoeConfig
from .configuration_llama_moe import LlamaMoeConfig
from .configuration_mistral_moe import MistralMoeConfig
from .configuration_modernbert_moe import ModernBertMoeConfig
from .configuration_moe import MoeConfigMixin
from .configuration_mpnet_moe import MPNetMoeConfig
from .configuration_opt_moe import OPTMoeConfig
from .configuration_phi_moe import PhiMoeConfig
from .configuration_qwen2_moe import Qwen2UpcycledMoeConfig
from .configuration_qwen3_moe import Qwen3UpcycledMoeConfig
from .configuration_roberta_moe import RobertaMoeConfig
from .configuration_vit_moe import ViTMoeConfig
from .configuration_wav2vec2_moe import Wav2Vec2MoeConfig
from .configuration_whisper_moe import WhisperMoeConfig
from .configuration_xlm_roberta_moe import XLMRobertaMoeConfig

_ALL = (
    BertMoeConfig,
    Dinov2MoeConfig,
    DistilBertMoeConfig,
    ElectraMoeConfig,
    Gemma2MoeConfig,
    Gemma3TextMoeConfig,
    GPT2MoeConfig,
    GPTNeoMoeConfig,
    GPTNeoXMoeConfig,
    GPTJMoeConfig,
    LlamaMoeConfig,
    MPNetMoeConfig,
    MistralMoeConfig,
    ModernBertMoeConfig,
    OPTMoeConfig,
    PhiMoeConfig,
    Qwen2UpcycledMoeConfig,
    Qwen3UpcycledMoeConfig,
    RobertaMoeConfig,
    ViTMoeConfig,
    Wav2Vec2MoeConfig,
    WhisperMoeConfig,
    XLMRobertaMoeConfig,
)


def dense_type(config_class: type[MoeConfigMixin]) -> str:
    """`model_type` of the dense family. (The mixture's can't always be read back to it: Transformers has a
    `qwen2_moe` of its own.)"""
    return config_class.__bases__[1].model_type  # type: ignore[attr-defined]


# Dense `model_type` -> the mixture's configuration.
CONFIGS: dict[str, type[MoeConfigMixin]] = {dense_type(config): config for config in _ALL}


def modeling_module(config_class: type[MoeConfigMixin]) -> Any:
    """The module with the models of a configuration."""
    return import_module(f".{config_class.modeling_module}", __package__)


def model_class(config_class: type[MoeConfigMixin], name: str) -> type[PreTrainedModel]:
    """One of them by its name."""
    return getattr(modeling_module(config_class), name)
