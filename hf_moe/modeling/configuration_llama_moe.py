"""Llama with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig

from .configuration_moe import MoeConfigMixin


@strict
class LlamaMoeConfig(MoeConfigMixin, LlamaConfig):
    """`LlamaConfig` with the fields of `MoeConfigMixin`."""

    model_type = "llama_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_llama_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "LlamaMoeModel",
        "AutoModelForCausalLM": "LlamaMoeForCausalLM",
        "AutoModelForSequenceClassification": "LlamaMoeForSequenceClassification",
        "AutoModelForTokenClassification": "LlamaMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "LlamaMoeForQuestionAnswering",
    }


__all__ = ["LlamaMoeConfig"]
