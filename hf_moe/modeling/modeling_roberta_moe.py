"""RoBERTa with a mixture of experts in the place of its feed-forward networks: models."""

from transformers.generation import GenerationMixin
from transformers.models.roberta.modeling_roberta import (
    RobertaEncoder,
    RobertaForCausalLM,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaLayer,
    RobertaModel,
    RobertaPreTrainedModel,
)

from .configuration_roberta_moe import RobertaMoeConfig
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


class RobertaMoeLayer(MoeChunkLayerMixin, RobertaLayer):
    pass


class RobertaMoeEncoder(RobertaEncoder):
    __init__ = rebind(RobertaEncoder.__init__, RobertaLayer=RobertaMoeLayer)


class RobertaMoePreTrainedModel(MoePreTrainedModelMixin, RobertaPreTrainedModel):
    config: RobertaMoeConfig
    config_class = RobertaMoeConfig
    _no_split_modules = ["RobertaEmbeddings", "RobertaMoeLayer"]


class RobertaMoeModel(RobertaMoePreTrainedModel, RobertaModel):
    __init__ = rebind(RobertaModel.__init__, RobertaEncoder=RobertaMoeEncoder)
    forward = body_forward(RobertaModel.forward, MoeBaseModelOutputWithPoolingAndCrossAttentions)


class RobertaMoeForMaskedLM(RobertaMoePreTrainedModel, RobertaForMaskedLM):
    __init__ = rebind(RobertaForMaskedLM.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForMaskedLM.forward, MoeMaskedLMOutput)


class RobertaMoeForCausalLM(RobertaMoePreTrainedModel, RobertaForCausalLM, GenerationMixin):
    __init__ = rebind(RobertaForCausalLM.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForCausalLM.forward, MoeCausalLMOutputWithCrossAttentions)


class RobertaMoeForSequenceClassification(RobertaMoePreTrainedModel, RobertaForSequenceClassification):
    __init__ = rebind(RobertaForSequenceClassification.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForSequenceClassification.forward, MoeSequenceClassifierOutput)


class RobertaMoeForMultipleChoice(RobertaMoePreTrainedModel, RobertaForMultipleChoice):
    __init__ = rebind(RobertaForMultipleChoice.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class RobertaMoeForTokenClassification(RobertaMoePreTrainedModel, RobertaForTokenClassification):
    __init__ = rebind(RobertaForTokenClassification.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForTokenClassification.forward, MoeTokenClassifierOutput)


class RobertaMoeForQuestionAnswering(RobertaMoePreTrainedModel, RobertaForQuestionAnswering):
    __init__ = rebind(RobertaForQuestionAnswering.__init__, RobertaModel=RobertaMoeModel)
    forward = head_forward(RobertaForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "RobertaMoeConfig",
    "RobertaMoeForCausalLM",
    "RobertaMoeForMaskedLM",
    "RobertaMoeForMultipleChoice",
    "RobertaMoeForQuestionAnswering",
    "RobertaMoeForSequenceClassification",
    "RobertaMoeForTokenClassification",
    "RobertaMoeModel",
    "RobertaMoePreTrainedModel",
]
