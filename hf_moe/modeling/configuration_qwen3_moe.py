"""Qwen3 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration_moe import MoeConfigMixin


@strict
class Qwen3MoeConfig(MoeConfigMixin, Qwen3Config):
    """`Qwen3Config` with the fields of `MoeConfigMixin`."""

    model_type = "qwen3_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_qwen3_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Qwen3MoeModel",
        "AutoModelForCausalLM": "Qwen3MoeForCausalLM",
        "AutoModelForSequenceClassification": "Qwen3MoeForSequenceClassification",
        "AutoModelForTokenClassification": "Qwen3MoeForTokenClassification",
        "AutoModelForQuestionAnswering": "Qwen3MoeForQuestionAnswering",
    }


__all__ = ["Qwen3MoeConfig"]
