"""MPNet with a mixture of experts in the place of its feed-forward networks: models."""

from torch import nn
from transformers.models.mpnet.modeling_mpnet import (
    MPNetEncoder,
    MPNetForMaskedLM,
    MPNetForMultipleChoice,
    MPNetForQuestionAnswering,
    MPNetForSequenceClassification,
    MPNetForTokenClassification,
    MPNetModel,
    MPNetPreTrainedModel,
)

from .configuration_mpnet_moe import MPNetMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, capturing, handing_on, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutputWithPooling,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
)


class MPNetMoeEncoder(MPNetEncoder):
    """The dense layer runs `intermediate`, then `output` with norm, dropout and residual, which stay as they are."""

    def __init__(self, config):
        super().__init__(config)
        for index in config.moe_layer_indices:  # the dense layers do not know their index
            self.layer[index].intermediate = MoeBlock(config, hidden_act=config.hidden_act)
            self.layer[index].output.dense = nn.Identity()


class MPNetMoePreTrainedModel(MoePreTrainedModelMixin, MPNetPreTrainedModel):
    config: MPNetMoeConfig
    config_class = MPNetMoeConfig
    _no_split_modules = ["MPNetEmbeddings", "MPNetLayer"]


class MPNetMoeModel(MPNetMoePreTrainedModel, MPNetModel):
    __init__ = rebind(MPNetModel.__init__, MPNetEncoder=MPNetMoeEncoder)
    forward = body_forward(capturing(MPNetModel.forward), MoeBaseModelOutputWithPooling)


class MPNetMoeForMaskedLM(MPNetMoePreTrainedModel, MPNetForMaskedLM):
    __init__ = rebind(MPNetForMaskedLM.__init__, MPNetModel=MPNetMoeModel)
    forward = head_forward(handing_on(MPNetForMaskedLM.forward), MoeMaskedLMOutput)


class MPNetMoeForSequenceClassification(MPNetMoePreTrainedModel, MPNetForSequenceClassification):
    __init__ = rebind(MPNetForSequenceClassification.__init__, MPNetModel=MPNetMoeModel)
    forward = head_forward(handing_on(MPNetForSequenceClassification.forward), MoeSequenceClassifierOutput)


class MPNetMoeForMultipleChoice(MPNetMoePreTrainedModel, MPNetForMultipleChoice):
    __init__ = rebind(MPNetForMultipleChoice.__init__, MPNetModel=MPNetMoeModel)
    forward = head_forward(handing_on(MPNetForMultipleChoice.forward), MoeMultipleChoiceModelOutput)


class MPNetMoeForTokenClassification(MPNetMoePreTrainedModel, MPNetForTokenClassification):
    __init__ = rebind(MPNetForTokenClassification.__init__, MPNetModel=MPNetMoeModel)
    forward = head_forward(handing_on(MPNetForTokenClassification.forward), MoeTokenClassifierOutput)


class MPNetMoeForQuestionAnswering(MPNetMoePreTrainedModel, MPNetForQuestionAnswering):
    __init__ = rebind(MPNetForQuestionAnswering.__init__, MPNetModel=MPNetMoeModel)
    forward = head_forward(handing_on(MPNetForQuestionAnswering.forward), MoeQuestionAnsweringModelOutput)


__all__ = [
    "MPNetMoeConfig",
    "MPNetMoeForMaskedLM",
    "MPNetMoeForMultipleChoice",
    "MPNetMoeForQuestionAnswering",
    "MPNetMoeForSequenceClassification",
    "MPNetMoeForTokenClassification",
    "MPNetMoeModel",
    "MPNetMoePreTrainedModel",
]
