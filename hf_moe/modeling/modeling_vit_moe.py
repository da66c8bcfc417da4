"""ViT with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from transformers.modeling_outputs import MaskedImageModelingOutput
from transformers.models.vit.modeling_vit import (
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTModel,
    ViTPreTrainedModel,
)

from .configuration_vit_moe import ViTMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import MoeBaseModelOutputWithPooling, MoeImageClassifierOutput, RouterOutput


@dataclass
class MoeMaskedImageModelingOutput(RouterOutput, MaskedImageModelingOutput):
    pass


class ViTMoePreTrainedModel(MoePreTrainedModelMixin, ViTPreTrainedModel):
    config: ViTMoeConfig
    config_class = ViTMoeConfig


class ViTMoeModel(ViTMoePreTrainedModel, ViTModel):
    forward = body_forward(ViTModel.forward, MoeBaseModelOutputWithPooling)

    def post_init(self):
        for index in self.config.moe_layer_indices:  # the dense layers do not know their index
            self.layers[index].mlp = MoeBlock(self.config, hidden_act=self.config.hidden_act)
        super().post_init()


class ViTMoeForImageClassification(ViTMoePreTrainedModel, ViTForImageClassification):
    __init__ = rebind(ViTForImageClassification.__init__, ViTModel=ViTMoeModel)
    forward = head_forward(ViTForImageClassification.forward, MoeImageClassifierOutput)


class ViTMoeForMaskedImageModeling(ViTMoePreTrainedModel, ViTForMaskedImageModeling):
    __init__ = rebind(ViTForMaskedImageModeling.__init__, ViTModel=ViTMoeModel)
    forward = head_forward(ViTForMaskedImageModeling.forward, MoeMaskedImageModelingOutput)


__all__ = [
    "ViTMoeConfig",
    "ViTMoeForImageClassification",
    "ViTMoeForMaskedImageModeling",
    "ViTMoeModel",
    "ViTMoePreTrainedModel",
]
