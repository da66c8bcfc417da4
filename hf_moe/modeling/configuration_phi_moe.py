"""Phi with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import PhiConfig

from .configuration_moe import MoeConfigMixin


@strict
class PhiMoeConfig(MoeConfigMixin, PhiConfig):
    """`PhiConfig` with the fields of `MoeConfigMixin`."""

    model_type = "phi_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_phi_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "PhiMoeModel",
        "AutoModelForCausalLM": "PhiMoeForCausalLM",
        "AutoModelForSequenceClassification": "PhiMoeForSequenceClassification",
        "AutoModelForTokenClassification": "PhiMoeForTokenClassification",
    }


__all__ = ["PhiMoeConfig"]
