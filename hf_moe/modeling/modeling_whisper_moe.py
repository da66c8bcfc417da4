"""Whisper's encoder with a mixture of experts in the place of its feed-forward networks: models."""

from typing import Any

from torch import nn
from transformers.models.whisper.modeling_whisper import (
    WhisperEncoder,
    WhisperEncoderLayer,
    WhisperForAudioClassification,
    WhisperPreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_whisper_moe import WhisperMoeConfig
from .modeling_moe import (
    MoeBaseModelOutput,
    MoePreTrainedModelMixin,
    MoeSequenceClassifierOutput,
    body_forward,
    head_forward,
    rebind,
)
from .moe_layers import MoeBlock, TopKRouter


class WhisperMoeEncoderLayer(WhisperEncoderLayer):
    def put_in(self, mixture: MoeBlock) -> None:
        del self.fc1
        self.mlp = mixture
        self.activation_fn = nn.Identity()
        self.fc2 = nn.Identity()  # type: ignore[assignment]
        self.activation_dropout = 0.0

    @property
    def fc1(self):  # type: ignore[override]
        """The dense layer calls `fc1`, the activation and `fc2` itself; a mixture is all three, and keeps its name."""
        return self._modules["mlp" if "mlp" in self._modules else "fc1"]


class WhisperMoePreTrainedModel(MoePreTrainedModelMixin, WhisperPreTrainedModel):
    config: WhisperMoeConfig
    config_class = WhisperMoeConfig
    base_model_prefix = "encoder"
    _no_split_modules = ["WhisperMoeEncoderLayer"]
    _can_record_outputs = {
        **WhisperEncoder._can_record_outputs,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }


class WhisperMoeEncoder(WhisperMoePreTrainedModel, WhisperEncoder):
    __init__ = rebind(WhisperEncoder.__init__, WhisperEncoderLayer=WhisperMoeEncoderLayer)
    forward = body_forward(WhisperEncoder.forward, MoeBaseModelOutput)

    def post_init(self):
        act, dropout = self.config.activation_function, self.config.activation_dropout
        for index in self.config.moe_layer_indices:  # the dense layers do not know their index
            layer: Any = self.layers[index]
            layer.put_in(MoeBlock(self.config, hidden_act=act, activation_dropout=dropout))
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
