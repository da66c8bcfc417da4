"""Llama with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    LlamaPreTrainedModel,
)

from .configuration_llama_moe import LlamaMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class LlamaMoeDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.hidden_act, gated=True, bias=config.mlp_bias
            )


class LlamaMoePreTrainedModel(MoePreTrainedModelMixin, LlamaPreTrainedModel):
    config: LlamaMoeConfig
    config_class = LlamaMoeConfig
    _no_split_modules = ["LlamaMoeDecoderLayer"]


class LlamaMoeModel(LlamaMoePreTrainedModel, LlamaModel):
    __init__ = rebind(LlamaModel.__init__, LlamaDecoderLayer=LlamaMoeDecoderLayer)
    forward = body_forward(LlamaModel.forward, MoeBaseModelOutputWithPast)


class LlamaMoeForCausalLM(LlamaMoePreTrainedModel, LlamaForCausalLM, GenerationMixin):
    __init__ = rebind(LlamaForCausalLM.__init__, LlamaModel=LlamaMoeModel)
    forward = head_forward(LlamaForCausalLM.forward, MoeCausalLMOutputWithPast)


class LlamaMoeForSequenceClassification(LlamaMoePreTrainedModel, LlamaForSequenceClassification):
    __init__ = rebind(LlamaForSequenceClassification.__init__, AutoModel=auto_model_of(LlamaMoeModel))
    forward = head_forward(LlamaForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class LlamaMoeForTokenClassification(LlamaMoePreTrainedModel, LlamaForTokenClassification):
    __init__ = rebind(LlamaForTokenClassification.__init__, AutoModel=auto_model_of(LlamaMoeModel))
    forward = head_forward(LlamaForTokenClassification.forward, MoeTokenClassifierOutput)


class LlamaMoeForQuestionAnswering(LlamaMoePreTrainedModel, LlamaForQuestionAnswering):
    __init__ = rebind(LlamaForQuestionAnswering.__init__, AutoModel=auto_model_of(LlamaMoeModel))
    forward = head_forward(LlamaForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "LlamaMoeConfig",
    "LlamaMoeForCausalLM",
    "LlamaMoeForQuestionAnswering",
    "LlamaMoeForSequenceClassification",
    "LlamaMoeForTokenClassification",
    "LlamaMoeModel",
    "LlamaMoePreTrainedModel",
]
