"""The architectures that can be converted: dense `model_type` -> table."""

from .bert import BERT
from .dinov2 import DINOV2
from .distilbert import DISTILBERT
from .electra import ELECTRA
from .family import Family
from .gemma2 import GEMMA2
from .gemma3_text import GEMMA3_TEXT
from .gpt2 import GPT2
from .gpt_neo import GPT_NEO
from .gpt_neox import GPT_NEOX
from .gptj import GPTJ
from .llama import LLAMA
from .mistral import MISTRAL
from .modernbert import MODERNBERT
from .mpnet import MPNET
from .opt import OPT
from .phi import PHI
from .qwen2 import QWEN2
from .qwen3 import QWEN3
from .roberta import ROBERTA
from .vit import VIT
from .wav2vec2 import WAV2VEC2
from .whisper import WHISPER
from .xlm_roberta import XLM_ROBERTA

_ALL = (
    BERT,
    DINOV2,
    DISTILBERT,
    ELECTRA,
    GEMMA2,
    GEMMA3_TEXT,
    GPT2,
    GPT_NEO,
    GPT_NEOX,
    GPTJ,
    LLAMA,
    MISTRAL,
    MODERNBERT,
    MPNET,
    OPT,
    PHI,
    QWEN2,
    QWEN3,
    ROBERTA,
    VIT,
    WAV2VEC2,
    WHISPER,
    XLM_ROBERTA,
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = ["FAMILIES", "Family"]
