"""Wav2Vec2 with a mixture of experts in the place of its feed-forward networks: configuration."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from transformers import Wav2Vec2Config

from .configuration_moe import MoeConfigMixin


@strict
class Wav2Vec2MoeConfig(MoeConfigMixin, Wav2Vec2Config):
    """`Wav2Vec2Config` with the fields of `MoeConfigMixin`."""

    model_type = "wav2vec2_moe"
    attribute_map = {"num_local_experts": "num_experts"}

    modeling_module: ClassVar[str] = "modeling_wav2vec2_moe"
    moe_block: ClassVar[str] = "encoder.layers.*.feed_forward"
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoModel": "Wav2Vec2MoeModel",
        "AutoModelForPreTraining": "Wav2Vec2MoeForPreTraining",
        "AutoModelForCTC": "Wav2Vec2MoeForCTC",
        "AutoModelForAudioClassification": "Wav2Vec2MoeForSequenceClassification",
        "AutoModelForAudioFrameClassification": "Wav2Vec2MoeForAudioFrameClassification",
        "AutoModelForAudioXVector": "Wav2Vec2MoeForXVector",
    }


__all__ = ["Wav2Vec2MoeConfig"]
