"""ViT with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import ViTConfig

from .configuration_moe import MoeConfigMixin


@strict
class ViTMoeConfig(MoeConfigMixin, ViTConfig):
    """`ViTConfig` with the fields of `MoeConfigMixin`."""

    model_type = "vit_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_vit_moe"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "ViTMoeModel",
        "AutoModelForImageClassification": "ViTMoeForImageClassification",
        "AutoModelForMaskedImageModeling": "ViTMoeForMaskedImageModeling",
    }


__all__ = ["ViTMoeConfig"]
