"""Mistral with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import MistralConfig

from .configuration_moe import MoeConfigMixin


@strict
class MistralMoeConfig(MoeConfigMixin, MistralConfig):
    """`MistralConfig` with the fields of `MoeConfigMixin`."""

    model_type = "mistral_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_mistral_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "MistralMoeModel",
        "AutoModelForCausalLM": "MistralMoeForCausalLM",
        "AutoModelForSequenceClassification": "MistralMoeForSequenceClassification",
        "AutoModelForTokenClassification": "MistralMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "MistralMoeForQuestionAnswering",
    }


__all__ = ["MistralMoeConfig"]
