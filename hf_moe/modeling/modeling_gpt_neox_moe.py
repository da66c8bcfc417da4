"""GPT-NeoX with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXLayer,
    GPTNeoXModel,
    GPTNeoXPreTrainedModel,
)

from .configuration_gpt_neox_moe import GPTNeoXMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class GPTNeoXMoeLayer(GPTNeoXLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act)  # type: ignore[assignment]


class GPTNeoXMoePreTrainedModel(MoePreTrainedModelMixin, GPTNeoXPreTrainedModel):
    config: GPTNeoXMoeConfig
    config_class = GPTNeoXMoeConfig
    _no_split_modules = ["GPTNeoXMoeLayer"]


class GPTNeoXMoeModel(GPTNeoXMoePreTrainedModel, GPTNeoXModel):
    __init__ = rebind(GPTNeoXModel.__init__, GPTNeoXLayer=GPTNeoXMoeLayer)
    forward = body_forward(GPTNeoXModel.forward, MoeBaseModelOutputWithPast)


class GPTNeoXMoeForCausalLM(GPTNeoXMoePreTrainedModel, GPTNeoXForCausalLM, GenerationMixin):
    __init__ = rebind(GPTNeoXForCausalLM.__init__, GPTNeoXModel=GPTNeoXMoeModel)
    forward = head_forward(GPTNeoXForCausalLM.forward, MoeCausalLMOutputWithPast)


class GPTNeoXMoeForSequenceClassification(GPTNeoXMoePreTrainedModel, GPTNeoXForSequenceClassification):
    __init__ = rebind(GPTNeoXForSequenceClassification.__init__, GPTNeoXModel=GPTNeoXMoeModel)
    forward = head_forward(GPTNeoXForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class GPTNeoXMoeForTokenClassification(GPTNeoXMoePreTrainedModel, GPTNeoXForTokenClassification):
    __init__ = rebind(GPTNeoXForTokenClassification.__init__, GPTNeoXModel=GPTNeoXMoeModel)
    forward = head_forward(GPTNeoXForTokenClassification.forward, MoeTokenClassifierOutput)


class GPTNeoXMoeForQuestionAnswering(GPTNeoXMoePreTrainedModel, GPTNeoXForQuestionAnswering):
    __init__ = rebind(GPTNeoXForQuestionAnswering.__init__, GPTNeoXModel=GPTNeoXMoeModel)
    forward = head_forward(GPTNeoXForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "GPTNeoXMoeConfig",
    "GPTNeoXMoeForCausalLM",
    "GPTNeoXMoeForQuestionAnswering",
    "GPTNeoXMoeForSequenceClassification",
    "GPTNeoXMoeForTokenClassification",
    "GPTNeoXMoeModel",
    "GPTNeoXMoePreTrainedModel",
]
