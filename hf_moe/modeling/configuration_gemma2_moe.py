"""Gemma 2 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Gemma2Config

from .configuration_moe import MoeConfigMixin


@strict
class Gemma2MoeConfig(MoeConfigMixin, Gemma2Config):
    """`Gemma2Config` with the fields of `MoeConfigMixin`."""

    model_type = "gemma2_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_gemma2_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Gemma2MoeModel",
        "AutoModelForCausalLM": "Gemma2MoeForCausalLM",
        "AutoModelForSequenceClassification": "Gemma2MoeForSequenceClassification",
        "AutoModelForTokenClassification": "Gemma2MoeForTokenClassification",
    }


__all__ = ["Gemma2MoeConfig"]
