"""Gemma 3 (text) with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Gemma3TextConfig

from .configuration_moe import MoeConfigMixin


@strict
class Gemma3TextMoeConfig(MoeConfigMixin, Gemma3TextConfig):
    """`Gemma3TextConfig` with the fields of `MoeConfigMixin`."""

    model_type = "gemma3_text_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gemma3_text_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Gemma3TextMoeModel",
        "AutoModelForCausalLM": "Gemma3TextMoeForCausalLM",
        "AutoModelForSequenceClassification": "Gemma3TextMoeForSequenceClassification",
    }


__all__ = ["Gemma3TextMoeConfig"]
