"""Gemma 2 with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    Gemma2PreTrainedModel,
)

from .configuration_gemma2_moe import Gemma2MoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class Gemma2MoeDecoderLayer(Gemma2DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.hidden_activation, gated=True, bias=False
            )


class Gemma2MoePreTrainedModel(MoePreTrainedModelMixin, Gemma2PreTrainedModel):
    config: Gemma2MoeConfig
    config_class = Gemma2MoeConfig
    _no_split_modules = ["Gemma2MoeDecoderLayer"]


class Gemma2MoeModel(Gemma2MoePreTrainedModel, Gemma2Model):
    __init__ = rebind(Gemma2Model.__init__, Gemma2DecoderLayer=Gemma2MoeDecoderLayer)
    forward = body_forward(Gemma2Model.forward, MoeBaseModelOutputWithPast)


class Gemma2MoeForCausalLM(Gemma2MoePreTrainedModel, Gemma2ForCausalLM, GenerationMixin):
    __init__ = rebind(Gemma2ForCausalLM.__init__, Gemma2Model=Gemma2MoeModel)
    forward = head_forward(Gemma2ForCausalLM.forward, MoeCausalLMOutputWithPast)


class Gemma2MoeForSequenceClassification(Gemma2MoePreTrainedModel, Gemma2ForSequenceClassification):
    __init__ = rebind(Gemma2ForSequenceClassification.__init__, AutoModel=auto_model_of(Gemma2MoeModel))
    forward = head_forward(Gemma2ForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class Gemma2MoeForTokenClassification(Gemma2MoePreTrainedModel, Gemma2ForTokenClassification):
    __init__ = rebind(Gemma2ForTokenClassification.__init__, AutoModel=auto_model_of(Gemma2MoeModel))
    forward = head_forward(Gemma2ForTokenClassification.forward, MoeTokenClassifierOutput)


__all__ = [
    "Gemma2MoeConfig",
    "Gemma2MoeForCausalLM",
    "Gemma2MoeForSequenceClassification",
    "Gemma2MoeForTokenClassification",
    "Gemma2MoeModel",
    "Gemma2MoePreTrainedModel",
]
