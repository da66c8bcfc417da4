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

from .configuration_qwen3_moe import Qwen3UpcycledMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, auto_model_of, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class Qwen3UpcycledMoeDecoderLayer(Qwen3DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act, gated=True, bias=False)  # type: ignore[assignment]


class Qwen3UpcycledMoePreTrainedModel(MoePreTrainedModelMixin, Qwen3PreTrainedModel):
    config: Qwen3UpcycledMoeConfig
    config_class = Qwen3UpcycledMoeConfig
    _no_split_modules = ["Qwen3UpcycledMoeDecoderLayer"]


class Qwen3UpcycledMoeModel(Qwen3UpcycledMoePreTrainedModel, Qwen3Model):
    __init__ = rebind(Qwen3Model.__init__, Qwen3DecoderLayer=Qwen3UpcycledMoeDecoderLayer)
    forward = body_forward(Qwen3Model.forward, MoeBaseModelOutputWithPast)


class Qwen3UpcycledMoeForCausalLM(Qwen3UpcycledMoePreTrainedModel, Qwen3ForCausalLM, GenerationMixin):
    __init__ = rebind(Qwen3ForCausalLM.__init__, Qwen3Model=Qwen3UpcycledMoeModel)
    forward = head_forward(Qwen3ForCausalLM.forward, MoeCausalLMOutputWithPast)


class Qwen3UpcycledMoeForSequenceClassification(Qwen3UpcycledMoePreTrainedModel, Qwen3ForSequenceClassification):
    __init__ = rebind(Qwen3ForSequenceClassification.__init__, AutoModel=auto_model_of(Qwen3UpcycledMoeModel))
    forward = head_forward(Qwen3ForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class Qwen3UpcycledMoeForTokenClassification(Qwen3UpcycledMoePreTrainedModel, Qwen3ForTokenClassification):
    __init__ = rebind(Qwen3ForTokenClassification.__init__, AutoModel=auto_model_of(Qwen3UpcycledMoeModel))
    forward = head_forward(Qwen3ForTokenClassification.forward, MoeTokenClassifierOutput)


class Qwen3UpcycledMoeForQuestionAnswering(Qwen3UpcycledMoePreTrainedModel, Qwen3ForQuestionAnswering):
    __init__ = rebind(Qwen3ForQuestionAnswering.__init__, AutoModel=auto_model_of(Qwen3UpcycledMoeModel))
    forward = head_forward(Qwen3ForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "Qwen3UpcycledMoeConfig",
    "Qwen3UpcycledMoeForCausalLM",
    "Qwen3UpcycledMoeForQuestionAnswering",
    "Qwen3UpcycledMoeForSequenceClassification",
    "Qwen3UpcycledMoeForTokenClassification",
    "Qwen3UpcycledMoeModel",
    "Qwen3UpcycledMoePreTrainedModel",
]
