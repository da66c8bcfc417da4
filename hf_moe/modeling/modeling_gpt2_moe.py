"""GPT-2 with a mixture of experts in the place of its feed-forward networks: models."""

import math
from dataclasses import dataclass

import torch
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.models.gpt2.modeling_gpt2 import (
    GPT2Block,
    GPT2DoubleHeadsModel,
    GPT2DoubleHeadsModelOutput,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
)

from .configuration_gpt2_moe import GPT2MoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_experts import MoeExperts
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPastAndCrossAttentions,
    MoeCausalLMOutputWithCrossAttentions,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
    MoeTokenClassifierOutput,
    RouterOutput,
)


@dataclass
class GPT2MoeDoubleHeadsModelOutput(RouterOutput, GPT2DoubleHeadsModelOutput):
    pass


class GPT2MoeBlock(GPT2Block):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config, hidden_act=config.activation_function, dropout=config.resid_pdrop
            )


class GPT2MoePreTrainedModel(MoePreTrainedModelMixin, GPT2PreTrainedModel):
    config: GPT2MoeConfig
    config_class = GPT2MoeConfig
    _no_split_modules = ["GPT2MoeBlock"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoeExperts):  # what enters the residual is scaled by depth, as in the dense `c_proj`
            std = self.config.initializer_range / math.sqrt(2 * self.config.n_layer)
            init.normal_(module.down_proj, mean=0.0, std=std)


class GPT2MoeModel(GPT2MoePreTrainedModel, GPT2Model):
    __init__ = rebind(GPT2Model.__init__, GPT2Block=GPT2MoeBlock)
    forward = body_forward(GPT2Model.forward, MoeBaseModelOutputWithPastAndCrossAttentions)


class GPT2MoeLMHeadModel(GPT2MoePreTrainedModel, GPT2LMHeadModel, GenerationMixin):
    __init__ = rebind(GPT2LMHeadModel.__init__, GPT2Model=GPT2MoeModel)
    forward = head_forward(GPT2LMHeadModel.forward, MoeCausalLMOutputWithCrossAttentions)


class GPT2MoeDoubleHeadsModel(GPT2MoePreTrainedModel, GPT2DoubleHeadsModel, GenerationMixin):
    __init__ = rebind(GPT2DoubleHeadsModel.__init__, GPT2Model=GPT2MoeModel)
    forward = head_forward(GPT2DoubleHeadsModel.forward, GPT2MoeDoubleHeadsModelOutput)


class GPT2MoeForSequenceClassification(GPT2MoePreTrainedModel, GPT2ForSequenceClassification):
    __init__ = rebind(GPT2ForSequenceClassification.__init__, GPT2Model=GPT2MoeModel)
    forward = head_forward(GPT2ForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class GPT2MoeForTokenClassification(GPT2MoePreTrainedModel, GPT2ForTokenClassification):
    __init__ = rebind(GPT2ForTokenClassification.__init__, GPT2Model=GPT2MoeModel)
    forward = head_forward(GPT2ForTokenClassification.forward, MoeTokenClassifierOutput)


class GPT2MoeForQuestionAnswering(GPT2MoePreTrainedModel, GPT2ForQuestionAnswering):
    __init__ = rebind(GPT2ForQuestionAnswering.__init__, GPT2Model=GPT2MoeModel)
    forward = head_forward(GPT2ForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "GPT2MoeConfig",
    "GPT2MoeDoubleHeadsModel",
    "GPT2MoeForQuestionAnswering",
    "GPT2MoeForSequenceClassification",
    "GPT2MoeForTokenClassification",
    "GPT2MoeLMHeadModel",
    "GPT2MoeModel",
    "GPT2MoePreTrainedModel",
]
