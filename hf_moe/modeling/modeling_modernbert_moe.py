"""ModernBERT with a mixture of experts in the place of its feed-forward networks: models."""

import math

import torch
from transformers import initialization as init
from transformers.models.modernbert.modeling_modernbert import (
    ModernBertEncoderLayer,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
    ModernBertPreTrainedModel,
)

from .configuration_modernbert_moe import ModernBertMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_experts import MoeExperts
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutput,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
)


class ModernBertMoeEncoderLayer(ModernBertEncoderLayer):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        if layer_idx in config.moe_layer_indices:
            self.mlp = MoeBlock(  # type: ignore[assignment]
                config,
                hidden_act=config.hidden_activation,
                gated=True,
                bias=config.mlp_bias,
                activation_dropout=config.mlp_dropout,
            )


class ModernBertMoePreTrainedModel(MoePreTrainedModelMixin, ModernBertPreTrainedModel):
    config: ModernBertMoeConfig
    config_class = ModernBertMoeConfig
    _no_split_modules = ["ModernBertEmbeddings", "ModernBertMoeEncoderLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoeExperts):  # as the dense `Wi` and `Wo`: the latter, which adds up, by depth
            std, cutoff = self.config.initializer_range, self.config.initializer_cutoff_factor
            depth = math.sqrt(2 * self.config.num_hidden_layers)
            for weight, scale in ((module.gate_up_proj, std), (module.down_proj, std / depth)):
                init.trunc_normal_(weight, mean=0.0, std=scale, a=-cutoff * scale, b=cutoff * scale)


class ModernBertMoeModel(ModernBertMoePreTrainedModel, ModernBertModel):
    __init__ = rebind(ModernBertModel.__init__, ModernBertEncoderLayer=ModernBertMoeEncoderLayer)
    forward = body_forward(ModernBertModel.forward, MoeBaseModelOutput)


class ModernBertMoeForMaskedLM(ModernBertMoePreTrainedModel, ModernBertForMaskedLM):
    __init__ = rebind(ModernBertForMaskedLM.__init__, ModernBertModel=ModernBertMoeModel)
    forward = head_forward(ModernBertForMaskedLM.forward, MoeMaskedLMOutput)


class ModernBertMoeForSequenceClassification(ModernBertMoePreTrainedModel, ModernBertForSequenceClassification):
    __init__ = rebind(ModernBertForSequenceClassification.__init__, ModernBertModel=ModernBertMoeModel)
    forward = head_forward(ModernBertForSequenceClassification.forward, MoeSequenceClassifierOutput)


class ModernBertMoeForMultipleChoice(ModernBertMoePreTrainedModel, ModernBertForMultipleChoice):
    __init__ = rebind(ModernBertForMultipleChoice.__init__, ModernBertModel=ModernBertMoeModel)
    forward = head_forward(ModernBertForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class ModernBertMoeForTokenClassification(ModernBertMoePreTrainedModel, ModernBertForTokenClassification):
    __init__ = rebind(ModernBertForTokenClassification.__init__, ModernBertModel=ModernBertMoeModel)
    forward = head_forward(ModernBertForTokenClassification.forward, MoeTokenClassifierOutput)


class ModernBertMoeForQuestionAnswering(ModernBertMoePreTrainedModel, ModernBertForQuestionAnswering):
    __init__ = rebind(ModernBertForQuestionAnswering.__init__, ModernBertModel=ModernBertMoeModel)
    forward = head_forward(ModernBertForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "ModernBertMoeConfig",
    "ModernBertMoeForMaskedLM",
    "ModernBertMoeForMultipleChoice",
    "ModernBertMoeForQuestionAnswering",
    "ModernBertMoeForSequenceClassification",
    "ModernBertMoeForTokenClassification",
    "ModernBertMoeModel",
    "ModernBertMoePreTrainedModel",
]
