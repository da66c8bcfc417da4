"""BERT with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from transformers.generation import GenerationMixin
from transformers.models.bert.modeling_bert import (
    BertEncoder,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForPreTrainingOutput,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLayer,
    BertLMHeadModel,
    BertModel,
    BertPreTrainedModel,
)

from .configuration_bert_moe import BertMoeConfig
from .modeling_moe import MoeChunkLayerMixin, MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_outputs import (
    MoeBaseModelOutputWithPoolingAndCrossAttentions,
    MoeCausalLMOutputWithCrossAttentions,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeNextSentencePredictorOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
    RouterOutput,
)


@dataclass
class BertMoeForPreTrainingOutput(RouterOutput, BertForPreTrainingOutput):
    pass


class BertMoeLayer(MoeChunkLayerMixin, BertLayer):
    pass


class BertMoeEncoder(BertEncoder):
    __init__ = rebind(BertEncoder.__init__, BertLayer=BertMoeLayer)


class BertMoePreTrainedModel(MoePreTrainedModelMixin, BertPreTrainedModel):
    config: BertMoeConfig
    config_class = BertMoeConfig
    _no_split_modules = ["BertEmbeddings", "BertMoeLayer"]


class BertMoeModel(BertMoePreTrainedModel, BertModel):
    __init__ = rebind(BertModel.__init__, BertEncoder=BertMoeEncoder)
    forward = body_forward(BertModel.forward, MoeBaseModelOutputWithPoolingAndCrossAttentions)


class BertMoeForPreTraining(BertMoePreTrainedModel, BertForPreTraining):
    __init__ = rebind(BertForPreTraining.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForPreTraining.forward, BertMoeForPreTrainingOutput)


class BertMoeLMHeadModel(BertMoePreTrainedModel, BertLMHeadModel, GenerationMixin):
    __init__ = rebind(BertLMHeadModel.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertLMHeadModel.forward, MoeCausalLMOutputWithCrossAttentions)


class BertMoeForMaskedLM(BertMoePreTrainedModel, BertForMaskedLM):
    __init__ = rebind(BertForMaskedLM.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForMaskedLM.forward, MoeMaskedLMOutput)


class BertMoeForNextSentencePrediction(BertMoePreTrainedModel, BertForNextSentencePrediction):
    __init__ = rebind(BertForNextSentencePrediction.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForNextSentencePrediction.forward, MoeNextSentencePredictorOutput)


class BertMoeForSequenceClassification(BertMoePreTrainedModel, BertForSequenceClassification):
    __init__ = rebind(BertForSequenceClassification.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForSequenceClassification.forward, MoeSequenceClassifierOutput)


class BertMoeForMultipleChoice(BertMoePreTrainedModel, BertForMultipleChoice):
    __init__ = rebind(BertForMultipleChoice.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class BertMoeForTokenClassification(BertMoePreTrainedModel, BertForTokenClassification):
    __init__ = rebind(BertForTokenClassification.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForTokenClassification.forward, MoeTokenClassifierOutput)


class BertMoeForQuestionAnswering(BertMoePreTrainedModel, BertForQuestionAnswering):
    __init__ = rebind(BertForQuestionAnswering.__init__, BertModel=BertMoeModel)
    forward = head_forward(BertForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "BertMoeConfig",
    "BertMoeForMaskedLM",
    "BertMoeForMultipleChoice",
    "BertMoeForNextSentencePrediction",
    "BertMoeForPreTraining",
    "BertMoeForQuestionAnswering",
    "BertMoeForSequenceClassification",
    "BertMoeForTokenClassification",
    "BertMoeLMHeadModel",
    "BertMoeModel",
    "BertMoePreTrainedModel",
]
