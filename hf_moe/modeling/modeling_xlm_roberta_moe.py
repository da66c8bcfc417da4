"""XLM-RoBERTa with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.xlm_roberta.modeling_xlm_roberta import (
    XLMRobertaEncoder,
    XLMRobertaForCausalLM,
    XLMRobertaForMaskedLM,
    XLMRobertaForMultipleChoice,
    XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification,
    XLMRobertaLayer,
    XLMRobertaModel,
    XLMRobertaPreTrainedModel,
)

from .configuration_xlm_roberta_moe import XLMRobertaMoeConfig
from .modeling_moe import MoeChunkLayerMixin, MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_outputs import (
    MoeBaseModelOutputWithPoolingAndCrossAttentions,
    MoeCausalLMOutputWithCrossAttentions,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
)


class XLMRobertaMoeLayer(MoeChunkLayerMixin, XLMRobertaLayer):
    pass


class XLMRobertaMoeEncoder(XLMRobertaEncoder):
    __init__ = rebind(XLMRobertaEncoder.__init__, XLMRobertaLayer=XLMRobertaMoeLayer)


class XLMRobertaMoePreTrainedModel(MoePreTrainedModelMixin, XLMRobertaPreTrainedModel):
    config: XLMRobertaMoeConfig
    config_class = XLMRobertaMoeConfig
    _no_split_modules = ["XLMRobertaEmbeddings", "XLMRobertaMoeLayer"]


class XLMRobertaMoeModel(XLMRobertaMoePreTrainedModel, XLMRobertaModel):
    __init__ = rebind(XLMRobertaModel.__init__, XLMRobertaEncoder=XLMRobertaMoeEncoder)
    forward = body_forward(XLMRobertaModel.forward, MoeBaseModelOutputWithPoolingAndCrossAttentions)


class XLMRobertaMoeForMaskedLM(XLMRobertaMoePreTrainedModel, XLMRobertaForMaskedLM):
    __init__ = rebind(XLMRobertaForMaskedLM.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForMaskedLM.forward, MoeMaskedLMOutput)


class XLMRobertaMoeForCausalLM(XLMRobertaMoePreTrainedModel, XLMRobertaForCausalLM, GenerationMixin):
    __init__ = rebind(XLMRobertaForCausalLM.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForCausalLM.forward, MoeCausalLMOutputWithCrossAttentions)


class XLMRobertaMoeForSequenceClassification(XLMRobertaMoePreTrainedModel, XLMRobertaForSequenceClassification):
    __init__ = rebind(XLMRobertaForSequenceClassification.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForSequenceClassification.forward, MoeSequenceClassifierOutput)


class XLMRobertaMoeForMultipleChoice(XLMRobertaMoePreTrainedModel, XLMRobertaForMultipleChoice):
    __init__ = rebind(XLMRobertaForMultipleChoice.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class XLMRobertaMoeForTokenClassification(XLMRobertaMoePreTrainedModel, XLMRobertaForTokenClassification):
    __init__ = rebind(XLMRobertaForTokenClassification.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForTokenClassification.forward, MoeTokenClassifierOutput)


class XLMRobertaMoeForQuestionAnswering(XLMRobertaMoePreTrainedModel, XLMRobertaForQuestionAnswering):
    __init__ = rebind(XLMRobertaForQuestionAnswering.__init__, XLMRobertaModel=XLMRobertaMoeModel)
    forward = head_forward(XLMRobertaForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "XLMRobertaMoeConfig",
    "XLMRobertaMoeForCausalLM",
    "XLMRobertaMoeForMaskedLM",
    "XLMRobertaMoeForMultipleChoice",
    "XLMRobertaMoeForQuestionAnswering",
    "XLMRobertaMoeForSequenceClassification",
    "XLMRobertaMoeForTokenClassification",
    "XLMRobertaMoeModel",
    "XLMRobertaMoePreTrainedModel",
]
