"""DINOv2 with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from transformers.modeling_outputs import BackboneOutput
from transformers.models.dinov2.modeling_dinov2 import (
    Dinov2Backbone,
    Dinov2Encoder,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2PreTrainedModel,
)

from .configuration_dinov2_moe import Dinov2MoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import MoeBaseModelOutput, MoeBaseModelOutputWithPooling, MoeImageClassifierOutput, RouterOutput


@dataclass
class MoeBackboneOutput(RouterOutput, BackboneOutput):
    pass


class Dinov2MoePreTrainedModel(MoePreTrainedModelMixin, Dinov2PreTrainedModel):
    config: Dinov2MoeConfig
    config_class = Dinov2MoeConfig


class Dinov2MoeEncoder(Dinov2MoePreTrainedModel, Dinov2Encoder):
    forward = body_forward(Dinov2Encoder.forward, MoeBaseModelOutput)

    def post_init(self):
        gated = self.config.use_swiglu_ffn
        hidden_act = "silu" if gated else self.config.hidden_act
        for index in self.config.moe_layer_indices:  # the dense layers do not know their index
            self.layer[index].mlp = MoeBlock(self.config, hidden_act=hidden_act, gated=gated)
        super().post_init()


class Dinov2MoeModel(Dinov2MoePreTrainedModel, Dinov2Model):
    __init__ = rebind(Dinov2Model.__init__, Dinov2Encoder=Dinov2MoeEncoder)
    forward = head_forward(Dinov2Model.forward, MoeBaseModelOutputWithPooling)


class Dinov2MoeForImageClassification(Dinov2MoePreTrainedModel, Dinov2ForImageClassification):
    __init__ = rebind(Dinov2ForImageClassification.__init__, Dinov2Model=Dinov2MoeModel)
    forward = head_forward(Dinov2ForImageClassification.forward, MoeImageClassifierOutput)


class Dinov2MoeBackbone(Dinov2MoePreTrainedModel, Dinov2Backbone):
    __init__ = rebind(Dinov2Backbone.__init__, Dinov2Encoder=Dinov2MoeEncoder)
    forward = head_forward(Dinov2Backbone.forward, MoeBackboneOutput)


__all__ = [
    "Dinov2MoeBackbone",
    "Dinov2MoeConfig",
    "Dinov2MoeForImageClassification",
    "Dinov2MoeModel",
    "Dinov2MoePreTrainedModel",
]
