"""The architectures that can be converted: dense `model_type` -> table."""

from .bert import BERT
from .family import Family
from .gpt2 import GPT2

FAMILIES: dict[str, Family] = {family.model_type: family for family in (BERT, GPT2)}

__all__ = ["FAMILIES", "Family"]
