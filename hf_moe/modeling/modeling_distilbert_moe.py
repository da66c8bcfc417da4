"""DistilBERT with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.models.distilbert.modeling_distilbert import (
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
    DistilBertPreTrainedModel,
    Transformer,
)

from .configuration_distilbert_moe import DistilBertMoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import (
    MoeBaseModelOutput,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
)


class DistilBertMoeTransformer(Transformer):
    def __init__(self, config):
        super().__init__(config)
        for index in config.moe_layer_indices:  # the dense layers do not know their index
            self.layer[index].ffn = MoeBlock(config, hidden_act=config.activation, dropout=config.dropout)


class DistilBertMoePreTrainedModel(MoePreTrainedModelMixin, DistilBertPreTrainedModel):
    config: DistilBertMoeConfig
    config_class = DistilBertMoeConfig
    _no_split_modules = ["Embeddings", "TransformerBlock"]


class DistilBertMoeModel(DistilBertMoePreTrainedModel, DistilBertModel):
    __init__ = rebind(DistilBertModel.__init__, Transformer=DistilBertMoeTransformer)
    forward = body_forward(DistilBertModel.forward, MoeBaseModelOutput)


class DistilBertMoeForMaskedLM(DistilBertMoePreTrainedModel, DistilBertForMaskedLM):
    __init__ = rebind(DistilBertForMaskedLM.__init__, DistilBertModel=DistilBertMoeModel)
    forward = head_forward(DistilBertForMaskedLM.forward, MoeMaskedLMOutput)


class DistilBertMoeForSequenceClassification(DistilBertMoePreTrainedModel, DistilBertForSequenceClassification):
    __init__ = rebind(DistilBertForSequenceClassification.__init__, DistilBertModel=DistilBertMoeModel)
    forward = head_forward(DistilBertForSequenceClassification.forward, MoeSequenceClassifierOutput)


class DistilBertMoeForMultipleChoice(DistilBertMoePreTrainedModel, DistilBertForMultipleChoice):
    __init__ = rebind(DistilBertForMultipleChoice.__init__, DistilBertModel=DistilBertMoeModel)
    forward = head_forward(DistilBertForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class DistilBertMoeForTokenClassification(DistilBertMoePreTrainedModel, DistilBertForTokenClassification):
    __init__ = rebind(DistilBertForTokenClassification.__init__, DistilBertModel=DistilBertMoeModel)
    forward = head_forward(DistilBertForTokenClassification.forward, MoeTokenClassifierOutput)


class DistilBertMoeForQuestionAnswering(DistilBertMoePreTrainedModel, DistilBertForQuestionAnswering):
    __init__ = rebind(DistilBertForQuestionAnswering.__init__, DistilBertModel=DistilBertMoeModel)
    forward = head_forward(DistilBertForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "DistilBertMoeConfig",
    "DistilBertMoeForMaskedLM",
    "DistilBertMoeForMultipleChoice",
    "DistilBertMoeForQuestionAnswering",
    "DistilBertMoeForSequenceClassification",
    "DistilBertMoeForTokenClassification",
    "DistilBertMoeModel",
    "DistilBertMoePreTrainedModel",
]
