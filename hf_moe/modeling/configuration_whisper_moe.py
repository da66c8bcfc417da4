"""Whisper's encoder with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import WhisperConfig

from .configuration_moe import MoeConfigMixin


@strict
class WhisperMoeConfig(MoeConfigMixin, WhisperConfig):
    """`WhisperConfig` with the fields of `MoeConfigMixin`; its layers are the encoder's."""

    model_type = "whisper_moe"
    attribute_map = {**WhisperConfig.attribute_map, "num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_whisper_moe"
    moe_block: ClassVar[str] = "layers.*.fc1"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "WhisperMoeEncoder",
        "AutoModelForAudioClassification": "WhisperMoeForAudioClassification",
    }

    @property
    def dense_intermediate_size(self) -> int:
        return self.encoder_ffn_dim


__all__ = ["WhisperMoeConfig"]
