"""Qwen3 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Qwen3Config

from .configuration_moe import MoeConfigMixin


@strict
class Qwen3UpcycledMoeConfig(MoeConfigMixin, Qwen3Config):
    """`Qwen3Config` with the fields of `MoeConfigMixin`."""

    model_type = "qwen3_upcycled_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_qwen3_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Qwen3UpcycledMoeModel",
        "AutoModelForCausalLM": "Qwen3UpcycledMoeForCausalLM",
        "AutoModelForSequenceClassification": "Qwen3UpcycledMoeForSequenceClassification",
        "AutoModelForTokenClassification": "Qwen3UpcycledMoeForTokenClassification",
        "AutoModelForQuestionAnswering": "Qwen3UpcycledMoeForQuestionAnswering",
    }


__all__ = ["Qwen3UpcycledMoeConfig"]
