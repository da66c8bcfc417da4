"""The architectures that can be converted: dense `model_type` -> table."""

from .bert import BERT
from .dinov2 import DINOV2
from .electra import ELECTRA
from .family import Family
from .gpt2 import GPT2
from .llama import LLAMA
from .mistral import MISTRAL
from .qwen3 import QWEN3
from .roberta import ROBERTA
from .vit import VIT
from .wav2vec2 import WAV2VEC2
from .whisper import WHISPER
from .xlm_roberta import XLM_ROBERTA

_ALL = (BERT, DINOV2, ELECTRA, GPT2, LLAMA, MISTRAL, QWEN3, ROBERTA, VIT, WAV2VEC2, WHISPER, XLM_ROBERTA)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "Family"]
