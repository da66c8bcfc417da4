"""OPT with a mixture of experts in the place of its feed-forward networks: models."""

import functools

from torch import nn
from transformers.generation import GenerationMixin
from transformers.models.opt.modeling_opt import (
    OPTDecoder,
    OPTDecoderLayer,
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    OPTPreTrainedModel,
)

from .configuration_opt_moe import OPTMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPast,
    MoeCausalLMOutputWithPast,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutputWithPast,
)


class OPTMoeDecoderLayer(OPTDecoderLayer):
    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        if layer_idx in config.moe_layer_indices:
            del self.fc1
            self.mlp = MoeBlock(config, hidden_act=config.activation_function, bias=config.enable_bias)
            self.activation_fn = nn.Identity()
            self.fc2 = nn.Identity()  # type: ignore[assignment]

    @property
    def fc1(self):  # type: ignore[override]
        """The dense layer calls `fc1`, the activation and `fc2` itself; a mixture is all three, and keeps its name."""
        return self._modules["mlp" if "mlp" in self._modules else "fc1"]


class OPTMoePreTrainedModel(MoePreTrainedModelMixin, OPTPreTrainedModel):
    config: OPTMoeConfig
    config_class = OPTMoeConfig
    _no_split_modules = ["OPTMoeDecoderLayer"]


class OPTMoeDecoder(OPTMoePreTrainedModel, OPTDecoder):
    __init__ = rebind(OPTDecoder.__init__, OPTDecoderLayer=OPTMoeDecoderLayer)
    forward = body_forward(OPTDecoder.forward, MoeBaseModelOutputWithPast)


class OPTMoeModel(OPTMoePreTrainedModel, OPTModel):
    __init__ = rebind(OPTModel.__init__, OPTDecoder=OPTMoeDecoder)

    @functools.wraps(OPTModel.forward)
    def forward(self, *args, **kwargs):  # type: ignore[override]
        """As the dense one, which hands on a few of its decoder's outputs: not the router logits."""
        return self.decoder(*args, **kwargs)


class OPTMoeForCausalLM(OPTMoePreTrainedModel, OPTForCausalLM, GenerationMixin):
    __init__ = rebind(OPTForCausalLM.__init__, OPTModel=OPTMoeModel)
    forward = head_forward(OPTForCausalLM.forward, MoeCausalLMOutputWithPast)


class OPTMoeForSequenceClassification(OPTMoePreTrainedModel, OPTForSequenceClassification):
    __init__ = rebind(OPTForSequenceClassification.__init__, OPTModel=OPTMoeModel)
    forward = head_forward(OPTForSequenceClassification.forward, MoeSequenceClassifierOutputWithPast)


class OPTMoeForQuestionAnswering(OPTMoePreTrainedModel, OPTForQuestionAnswering):
    __init__ = rebind(OPTForQuestionAnswering.__init__, OPTModel=OPTMoeModel)
    forward = head_forward(OPTForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "OPTMoeConfig",
    "OPTMoeForCausalLM",
    "OPTMoeForQuestionAnswering",
    "OPTMoeForSequenceClassification",
    "OPTMoeModel",
    "OPTMoePreTrainedModel",
]
