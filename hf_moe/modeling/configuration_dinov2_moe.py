"""DINOv2 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Dinov2Config

from .configuration_moe import MoeConfigMixin


@strict
class Dinov2MoeConfig(MoeConfigMixin, Dinov2Config):
    """`Dinov2Config` with the fields of `MoeConfigMixin`."""

    model_type = "dinov2_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_dinov2_moe"
    moe_block: ClassVar[str] = "encoder.layer.*.mlp"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Dinov2MoeModel",
        "AutoModelForImageClassification": "Dinov2MoeForImageClassification",
        "AutoBackbone": "Dinov2MoeBackbone",
    }

    @property
    def dense_intermediate_size(self) -> int:
        width = int(self.hidden_size * self.mlp_ratio)
        return (int(width * 2 / 3) + 7) // 8 * 8 if self.use_swiglu_ffn else width


__all__ = ["Dinov2MoeConfig"]
