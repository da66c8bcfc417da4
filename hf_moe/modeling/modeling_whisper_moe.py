"""Whisper's encoder with a mixture of experts in the place of its feed-forward networks: models."""

from typing import Any

from torch import nn
from transformers.models.whisper.modeling_whisper import (
    WhisperEncoder,
    WhisperForAudioClassification,
    WhisperPreTrainedModel,
)

from .configuration_whisper_moe import WhisperMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import MoeBaseModelOutput, MoeSequenceClassifierOutput


class WhisperMoePreTrainedModel(MoePreTrainedModelMixin, WhisperPreTrainedModel):
    config: WhisperMoeConfig
    config_class = WhisperMoeConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["WhisperEncoderLayer"]


class WhisperMoeEncoder(WhisperMoePreTrainedModel, WhisperEncoder):
    forward = body_forward(WhisperEncoder.forward, MoeBaseModelOutput)

    def post_init(self):
        """The dense layers have no module for the network as a whole, and do not know their index: the mixture takes
        the place of `fc1`, and what follows lets its output through."""
        config = self.config
        for index in config.moe_layer_indices:
            layer: Any = self.layers[index]
            layer.fc1 = MoeBlock(
                config, hidden_act=config.activation_function, activation_dropout=config.activation_dropout
            )
            layer.activation_fn = layer.fc2 = nn.Identity()
            layer.activation_dropout = 0.0
        super().post_init()


class WhisperMoeForAudioClassification(WhisperMoePreTrainedModel, WhisperForAudioClassification):
    __init__ = rebind(WhisperForAudioClassification.__init__, WhisperEncoder=WhisperMoeEncoder)
    forward = head_forward(WhisperForAudioClassification.forward, MoeSequenceClassifierOutput)


__all__ = [
    "WhisperMoeConfig",
    "WhisperMoeEncoder",
    "WhisperMoeForAudioClassification",
    "WhisperMoePreTrainedModel",
]
