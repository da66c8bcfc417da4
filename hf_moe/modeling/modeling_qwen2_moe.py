"""Qwen2 with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.qwen2.modeling_qwen2 import (
    Qwen2DecoderLayer,
    Qwen2ForCausalLM,
    Qwen2ForQuestionAnswering,
    Qwen2ForSequenceClassification,
    Qwen2ForTokenClassification,
    Qwen2Model,
    Qwen2PreTrainedModel,
)

from .configuration_qwen2_moe import Qwen2UpcycledMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class Qwen2UpcycledMoeDecoderLayer(Qwen2DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act, gated=True, bias=False)  # type: ignore[assignment]


class Qwen2UpcycledMoePreTrainedModel(MoePreTrainedModelMixin, Qwen2PreTrainedModel):
    config: Qwen2UpcycledMoeConfig
    config_class = Qwen2UpcycledMoeConfig
    _no_split_modules = ["Qwen2UpcycledMoeDecoderLayer"]


class Qwen2UpcycledMoeModel(Qwen2UpcycledMoePreTrainedModel, Qwen2Model):
    __init__ = rebind(Qwen2Model.__init__, Qwen2DecoderLayer=Qwen2UpcycledMoeDecoderLayer)
    forward = body_forward(Qwen2Model.forward, MoeBaseModelOutputWithPast)


class Qwen2UpcycledMoeForCausalLM(Qwen2UpcycledMoePreTrainedModel, Qwen2ForCausalLM, GenerationMixin):
    __init__ = rebind(Qwen2ForCausalLM.__init__, Qwen2Model=Qwen2UpcycledMoeModel)
    forward = head_forward(Qwen2ForCausalLM.forward, MoeCausalLMOutputWithPast)


class Qwen2UpcycledMoeForSequenceClassification(Qwen2UpcycledMoePreTrainedModel, Qwen2ForSequenceClassification):
    __init__ = rebind(Qwen2ForSequenceClassification.__init__, AutoModel=auto_model_of(Qwen2UpcycledMoeModel))
    forward = head_forward(Qwen2ForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class Qwen2UpcycledMoeForTokenClassification(Qwen2UpcycledMoePreTrainedModel, Qwen2ForTokenClassification):
    __init__ = rebind(Qwen2ForTokenClassification.__init__, AutoModel=auto_model_of(Qwen2UpcycledMoeModel))
    forward = head_forward(Qwen2ForTokenClassification.forward, MoeTokenClassifierOutput)


class Qwen2UpcycledMoeForQuestionAnswering(Qwen2UpcycledMoePreTrainedModel, Qwen2ForQuestionAnswering):
    __init__ = rebind(Qwen2ForQuestionAnswering.__init__, AutoModel=auto_model_of(Qwen2UpcycledMoeModel))
    forward = head_forward(Qwen2ForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "Qwen2UpcycledMoeConfig",
    "Qwen2UpcycledMoeForCausalLM",
    "Qwen2UpcycledMoeForQuestionAnswering",
    "Qwen2UpcycledMoeForSequenceClassification",
    "Qwen2UpcycledMoeForTokenClassification",
    "Qwen2UpcycledMoeModel",
    "Qwen2UpcycledMoePreTrainedModel",
]
