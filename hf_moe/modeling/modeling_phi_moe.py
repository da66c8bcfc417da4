"""Phi with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.phi.modeling_phi import (
    PhiDecoderLayer,
    PhiForCausalLM,
    PhiForSequenceClassification,
    PhiForTokenClassification,
    PhiModel,
    PhiPreTrainedModel,
)

from .configuration_phi_moe import PhiMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class PhiMoeDecoderLayer(PhiDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act)  # type: ignore[assignment]


class PhiMoePreTrainedModel(MoePreTrainedModelMixin, PhiPreTrainedModel):
    config: PhiMoeConfig
    config_class = PhiMoeConfig
    _no_split_modules = ["PhiMoeDecoderLayer"]


class PhiMoeModel(PhiMoePreTrainedModel, PhiModel):
    __init__ = rebind(PhiModel.__init__, PhiDecoderLayer=PhiMoeDecoderLayer)
    forward = body_forward(PhiModel.forward, MoeBaseModelOutputWithPast)


class PhiMoeForCausalLM(PhiMoePreTrainedModel, PhiForCausalLM, GenerationMixin):
    __init__ = rebind(PhiForCausalLM.__init__, PhiModel=PhiMoeModel)
    forward = head_forward(PhiForCausalLM.forward, MoeCausalLMOutputWithPast)


class PhiMoeForSequenceClassification(PhiMoePreTrainedModel, PhiForSequenceClassification):
    __init__ = rebind(PhiForSequenceClassification.__init__, AutoModel=auto_model_of(PhiMoeModel))
    forward = head_forward(PhiForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class PhiMoeForTokenClassification(PhiMoePreTrainedModel, PhiForTokenClassification):
    __init__ = rebind(PhiForTokenClassification.__init__, AutoModel=auto_model_of(PhiMoeModel))
    forward = head_forward(PhiForTokenClassification.forward, MoeTokenClassifierOutput)


__all__ = [
    "PhiMoeConfig",
    "PhiMoeForCausalLM",
    "PhiMoeForSequenceClassification",
    "PhiMoeForTokenClassification",
    "PhiMoeModel",
    "PhiMoePreTrainedModel",
]
