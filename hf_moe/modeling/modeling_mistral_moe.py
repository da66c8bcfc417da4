"""Mistral with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.mistral.modeling_mistral import (
    MistralDecoderLayer,
    MistralForCausalLM,
    MistralForQuestionAnswering,
    MistralForSequenceClassification,
    MistralForTokenClassification,
    MistralModel,
    MistralPreTrainedModel,
)

from .configuration_mistral_moe import MistralMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class MistralMoeDecoderLayer(MistralDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act, gated=True, bias=False)  # type: ignore[assignment]


class MistralMoePreTrainedModel(MoePreTrainedModelMixin, MistralPreTrainedModel):
    config: MistralMoeConfig
    config_class = MistralMoeConfig
    _no_split_modules = ["MistralMoeDecoderLayer"]


class MistralMoeModel(MistralMoePreTrainedModel, MistralModel):
    __init__ = rebind(MistralModel.__init__, MistralDecoderLayer=MistralMoeDecoderLayer)
    forward = body_forward(MistralModel.forward, MoeBaseModelOutputWithPast)


class MistralMoeForCausalLM(MistralMoePreTrainedModel, MistralForCausalLM, GenerationMixin):
    __init__ = rebind(MistralForCausalLM.__init__, MistralModel=MistralMoeModel)
    forward = head_forward(MistralForCausalLM.forward, MoeCausalLMOutputWithPast)


class MistralMoeForSequenceClassification(MistralMoePreTrainedModel, MistralForSequenceClassification):
    __init__ = rebind(MistralForSequenceClassification.__init__, AutoModel=auto_model_of(MistralMoeModel))
    forward = head_forward(MistralForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class MistralMoeForTokenClassification(MistralMoePreTrainedModel, MistralForTokenClassification):
    __init__ = rebind(MistralForTokenClassification.__init__, AutoModel=auto_model_of(MistralMoeModel))
    forward = head_forward(MistralForTokenClassification.forward, MoeTokenClassifierOutput)


class MistralMoeForQuestionAnswering(MistralMoePreTrainedModel, MistralForQuestionAnswering):
    __init__ = rebind(MistralForQuestionAnswering.__init__, AutoModel=auto_model_of(MistralMoeModel))
    forward = head_forward(MistralForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "MistralMoeConfig",
    "MistralMoeForCausalLM",
    "MistralMoeForQuestionAnswering",
    "MistralMoeForSequenceClassification",
    "MistralMoeForTokenClassification",
    "MistralMoeModel",
    "MistralMoePreTrainedModel",
]
