"""Gemma 3 (text) with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    Gemma3TextForSequenceClassification,
    Gemma3TextModel,
)

from .configuration_gemma3_text_moe import Gemma3TextMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import MoeBaseModelOutputWithPast, MoeCausalLMOutputWithPast, MoeSequenceClassifierOutputWithPast


class Gemma3TextMoeDecoderLayer(Gemma3DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.hidden_activation, gated=True, bias=False
            )


class Gemma3TextMoePreTrainedModel(MoePreTrainedModelMixin, Gemma3PreTrainedModel):
    config: Gemma3TextMoeConfig  # type: ignore[assignment]
    config_class = Gemma3TextMoeConfig
    _no_split_modules = ["Gemma3TextMoeDecoderLayer"]


class Gemma3TextMoeModel(Gemma3TextMoePreTrainedModel, Gemma3TextModel):  # type: ignore[misc]
    __init__ = rebind(Gemma3TextModel.__init__, Gemma3DecoderLayer=Gemma3TextMoeDecoderLayer)
    forward = body_forward(Gemma3TextModel.forward, MoeBaseModelOutputWithPast)


class Gemma3TextMoeForCausalLM(Gemma3TextMoePreTrainedModel, Gemma3ForCausalLM, GenerationMixin):  # type: ignore[misc]
    __init__ = rebind(Gemma3ForCausalLM.__init__, Gemma3TextModel=Gemma3TextMoeModel)
    forward = head_forward(Gemma3ForCausalLM.forward, MoeCausalLMOutputWithPast)


class Gemma3TextMoeForSequenceClassification(  # type: ignore[misc]
    Gemma3TextMoePreTrainedModel, Gemma3TextForSequenceClassification
):
    __init__ = rebind(Gemma3TextForSequenceClassification.__init__, AutoModel=auto_model_of(Gemma3TextMoeModel))
    forward = head_forward(Gemma3TextForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


__all__ = [
    "Gemma3TextMoeConfig",
    "Gemma3TextMoeForCausalLM",
    "Gemma3TextMoeForSequenceClassification",
    "Gemma3TextMoeModel",
    "Gemma3TextMoePreTrainedModel",
]
