"""GPT-J with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.gptj.modeling_gptj import (
    GPTJBlock,
    GPTJForCausalLM,
    GPTJForQuestionAnswering,
    GPTJForSequenceClassification,
    GPTJModel,
    GPTJPreTrainedModel,
)

from .configuration_gptj_moe import GPTJMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, capturing, handing_on, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
)


class GPTJMoeBlock(GPTJBlock):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.activation_function, dropout=config.resid_pdrop
            )


class GPTJMoePreTrainedModel(MoePreTrainedModelMixin, GPTJPreTrainedModel):
    config: GPTJMoeConfig
    config_class = GPTJMoeConfig
    _no_split_modules = ["GPTJMoeBlock"]


class GPTJMoeModel(GPTJMoePreTrainedModel, GPTJModel):
    __init__ = rebind(GPTJModel.__init__, GPTJBlock=GPTJMoeBlock)
    forward = body_forward(capturing(GPTJModel.forward), MoeBaseModelOutputWithPast)


class GPTJMoeForCausalLM(GPTJMoePreTrainedModel, GPTJForCausalLM, GenerationMixin):
    __init__ = rebind(GPTJForCausalLM.__init__, GPTJModel=GPTJMoeModel)
    forward = head_forward(handing_on(GPTJForCausalLM.forward), MoeCausalLMOutputWithPast)


class GPTJMoeForSequenceClassification(GPTJMoePreTrainedModel, GPTJForSequenceClassification):
    __init__ = rebind(GPTJForSequenceClassification.__init__, GPTJModel=GPTJMoeModel)
    forward = head_forward(handing_on(GPTJForSequenceClassification.forward), MoeSequenceClassifierOutputWithPast)


class GPTJMoeForQuestionAnswering(GPTJMoePreTrainedModel, GPTJForQuestionAnswering):
    __init__ = rebind(GPTJForQuestionAnswering.__init__, GPTJModel=GPTJMoeModel)
    forward = head_forward(handing_on(GPTJForQuestionAnswering.forward), MoeQuestionAnsweringModelOutput)


__all__ = [
    "GPTJMoeConfig",
    "GPTJMoeForCausalLM",
    "GPTJMoeForQuestionAnswering",
    "GPTJMoeForSequenceClassification",
    "GPTJMoeModel",
    "GPTJMoePreTrainedModel",
]
