"""BERT with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from torch import nn
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
from transformers.utils.output_capturing import OutputRecorder

from .configuration_bert_moe import BertMoeConfig
from .modeling_moe import (
    MoeBaseModelOutputWithPoolingAndCrossAttentions,
    MoeCausalLMOutputWithCrossAttentions,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeNextSentencePredictorOutput,
    MoePreTrainedModelMixin,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
    RouterOutput,
    body_forward,
    head_forward,
    rebind,
)
from .moe_layers import MoeBlock, TopKRouter


@dataclass
class BertMoeForPreTrainingOutput(RouterOutput, BertForPreTrainingOutput):
    pass


class BertMoeLayer(BertLayer):
    """LayerNorm, dropout and residual stay in `output`, outside the mixture: BERT normalises after the sum."""

    def __init__(self, config, layer_idx=None):
        super().__init__(config, layer_idx=layer_idx)
        self.is_moe = layer_idx in config.moe_layer_indices
        if self.is_moe:
            del self.intermediate
            self.output.dense = nn.Identity()  # type: ignore[assignment]
            self.mlp = MoeBlock(config, hidden_act=config.hidden_act)
            self.chunk_size_feed_forward = 0  # one router call a layer, or logits and mask fall out of step

    def feed_forward_chunk(self, attention_output):
        if not self.is_moe:
            return super().feed_forward_chunk(attention_output)
        return self.output(self.mlp(attention_output), attention_output)


class BertMoeEncoder(BertEncoder):
    __init__ = rebind(BertEncoder.__init__, BertLayer=BertMoeLayer)


class BertMoePreTrainedModel(MoePreTrainedModelMixin, BertPreTrainedModel):
    config: BertMoeConfig
    config_class = BertMoeConfig
    _no_split_modules = ["BertEmbeddings", "BertMoeLayer"]
    _can_record_outputs = {
        **BertPreTrainedModel._can_record_outputs,
        "router_logits": OutputRecorder(TopKRouter, index=0),
    }


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
