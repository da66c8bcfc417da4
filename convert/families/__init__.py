"""The architectures that can be converted: dense `model_type` -> table."""

from .bert import BERT
from .family import Family
from .gpt2 import GPT2
from .llama import LLAMA

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, GPT2, LLAMA)}

__all__ = ["FAMILIES", "Family"]
