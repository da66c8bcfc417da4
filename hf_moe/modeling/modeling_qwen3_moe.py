"""Qwen3 with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3DecoderLayer,
    Qwen3ForCausalLM,
    Qwen3ForQuestionAnswering,
    Qwen3ForSequenceClassification,
    Qwen3ForTokenClassification,
    Qwen3Model,
    Qwen3PreTrainedModel,
)
from transformers.utils.output_capturing import OutputRecorder

from .configuration_qwen3_moe import Qwen3MoeConfig
from .modeling_moe import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoePreTrainedModelMixin,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
    auto_model_of,
    body_forward,
    head_forward,
    rebind,
)
from .moe_layers import MoeBlock, TopKRouter


class Qwen3MoeDecoderLayer(Qwen3DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act, gated=True, bias=False)  # type: ignore[assignment]


class Qwen3MoePreTrainedModel(MoePreTrainedModelMixin, Qwen3PreTrainedModel):
    config: Qwen3MoeConfig
    config_class = Qwen3MoeConfig
    _no_split_modules = ["Qwen3MoeDecoderLayer"]
    _can_record_outputs = {
        **Qwen3PreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }


class Qwen3MoeModel(Qwen3MoePreTrainedModel, Qwen3Model):
    __init__ = rebind(Qwen3Model.__init__, Qwen3DecoderLayer=Qwen3MoeDecoderLayer)
    forward = body_forward(Qwen3Model.forward, MoeBaseModelOutputWithPast)


class Qwen3MoeForCausalLM(Qwen3MoePreTrainedModel, Qwen3ForCausalLM, GenerationMixin):
    __init__ = rebind(Qwen3ForCausalLM.__init__, Qwen3Model=Qwen3MoeModel)
    forward = head_forward(Qwen3ForCausalLM.forward, MoeCausalLMOutputWithPast)


class Qwen3MoeForSequenceClassification(Qwen3MoePreTrainedModel, Qwen3ForSequenceClassification):
    __init__ = rebind(Qwen3ForSequenceClassification.__init__, AutoModel=auto_model_of(Qwen3MoeModel))
    forward = head_forward(Qwen3ForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class Qwen3MoeForTokenClassification(Qwen3MoePreTrainedModel, Qwen3ForTokenClassification):
    __init__ = rebind(Qwen3ForTokenClassification.__init__, AutoModel=auto_model_of(Qwen3MoeModel))
    forward = head_forward(Qwen3ForTokenClassification.forward, MoeTokenClassifierOutput)


class Qwen3MoeForQuestionAnswering(Qwen3MoePreTrainedModel, Qwen3ForQuestionAnswering):
    __init__ = rebind(Qwen3ForQuestionAnswering.__init__, AutoModel=auto_model_of(Qwen3MoeModel))
    forward = head_forward(Qwen3ForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    "Qwen3MoeForQuestionAnswering",
    "Qwen3MoeForSequenceClassification",
    "Qwen3MoeForTokenClassification",
    "Qwen3MoeModel",
    "Qwen3MoePreTrainedModel",
]
