"""GPT-Neo with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.gpt_neo.modeling_gpt_neo import (
    GPTNeoBlock,
    GPTNeoForCausalLM,
    GPTNeoForQuestionAnswering,
    GPTNeoForSequenceClassification,
    GPTNeoForTokenClassification,
    GPTNeoModel,
    GPTNeoPreTrainedModel,
)

from .configuration_gpt_neo_moe import GPTNeoMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, capturing, handing_on, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
)


class GPTNeoMoeBlock(GPTNeoBlock):
    def __init__(self, config, layer_id=None):
        super().__init__(config, layer_id=layer_id)
        if layer_id in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.activation_function, dropout=config.resid_dropout
            )


class GPTNeoMoePreTrainedModel(MoePreTrainedModelMixin, GPTNeoPreTrainedModel):
    config: GPTNeoMoeConfig
    config_class = GPTNeoMoeConfig
    _no_split_modules = ["GPTNeoMoeBlock"]


class GPTNeoMoeModel(GPTNeoMoePreTrainedModel, GPTNeoModel):
    __init__ = rebind(GPTNeoModel.__init__, GPTNeoBlock=GPTNeoMoeBlock)
    forward = body_forward(capturing(GPTNeoModel.forward), MoeBaseModelOutputWithPast)


class GPTNeoMoeForCausalLM(GPTNeoMoePreTrainedModel, GPTNeoForCausalLM, GenerationMixin):
    __init__ = rebind(GPTNeoForCausalLM.__init__, GPTNeoModel=GPTNeoMoeModel)
    forward = head_forward(handing_on(GPTNeoForCausalLM.forward), MoeCausalLMOutputWithPast)


class GPTNeoMoeForSequenceClassification(GPTNeoMoePreTrainedModel, GPTNeoForSequenceClassification):
    __init__ = rebind(GPTNeoForSequenceClassification.__init__, GPTNeoModel=GPTNeoMoeModel)
    forward = head_forward(handing_on(GPTNeoForSequenceClassification.forward), MoeSequenceClassifierOutputWithPast)


class GPTNeoMoeForTokenClassification(GPTNeoMoePreTrainedModel, GPTNeoForTokenClassification):
    __init__ = rebind(GPTNeoForTokenClassification.__init__, GPTNeoModel=GPTNeoMoeModel)
    forward = head_forward(handing_on(GPTNeoForTokenClassification.forward), MoeTokenClassifierOutput)


class GPTNeoMoeForQuestionAnswering(GPTNeoMoePreTrainedModel, GPTNeoForQuestionAnswering):
    __init__ = rebind(GPTNeoForQuestionAnswering.__init__, GPTNeoModel=GPTNeoMoeModel)
    forward = head_forward(handing_on(GPTNeoForQuestionAnswering.forward), MoeQuestionAnsweringModelOutput)


__all__ = [
    "GPTNeoMoeConfig",
    "GPTNeoMoeForCausalLM",
    "GPTNeoMoeForQuestionAnswering",
    "GPTNeoMoeForSequenceClassification",
    "GPTNeoMoeForTokenClassification",
    "GPTNeoMoeModel",
    "GPTNeoMoePreTrainedModel",
]
