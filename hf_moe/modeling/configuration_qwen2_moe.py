"""Qwen2 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen2Config

from .configuration_moe import MoeConfigMixin


@strict
class Qwen2UpcycledMoeConfig(MoeConfigMixin, Qwen2Config):
    """`Qwen2Config` with the fields of `MoeConfigMixin`."""

    model_type = "qwen2_upcycled_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_qwen2_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Qwen2UpcycledMoeModel",
        "AutoModelForCausalLM": "Qwen2UpcycledMoeForCausalLM",
        "AutoModelForSequenceClassification": "Qwen2UpcycledMoeForSequenceClassification",
        "AutoModelForTokenClassification": "Qwen2UpcycledMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "Qwen2UpcycledMoeForQuestionAnswering",
    }


__all__ = ["Qwen2UpcycledMoeConfig"]
