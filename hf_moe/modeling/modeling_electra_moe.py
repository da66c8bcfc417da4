"""ELECTRA with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from transformers.generation import GenerationMixin
from transformers.models.electra.modeling_electra import (
    ElectraEncoder,
    ElectraForCausalLM,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForPreTrainingOutput,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraLayer,
    ElectraModel,
    ElectraPreTrainedModel,
)

from .configuration_electra_moe import ElectraMoeConfig
from .modeling_moe import MoeChunkLayerMixin, MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_outputs import (
    MoeBaseModelOutputWithPastAndCrossAttentions,
    MoeCausalLMOutputWithCrossAttentions,
    MoeMaskedLMOutput,
    MoeMultipleChoiceModelOutput,
    MoeQuestionAnsweringModelOutput,
    MoeSequenceClassifierOutput,
    MoeTokenClassifierOutput,
    RouterOutput,
)


@dataclass
class ElectraMoeForPreTrainingOutput(RouterOutput, ElectraForPreTrainingOutput):
    pass


class ElectraMoeLayer(MoeChunkLayerMixin, ElectraLayer):
    pass


class ElectraMoeEncoder(ElectraEncoder):
    __init__ = rebind(ElectraEncoder.__init__, ElectraLayer=ElectraMoeLayer)


class ElectraMoePreTrainedModel(MoePreTrainedModelMixin, ElectraPreTrainedModel):
    config: ElectraMoeConfig
    config_class = ElectraMoeConfig
    _no_split_modules = []


class ElectraMoeModel(ElectraMoePreTrainedModel, ElectraModel):
    __init__ = rebind(ElectraModel.__init__, ElectraEncoder=ElectraMoeEncoder)
    forward = body_forward(ElectraModel.forward, MoeBaseModelOutputWithPastAndCrossAttentions)


class ElectraMoeForPreTraining(ElectraMoePreTrainedModel, ElectraForPreTraining):
    __init__ = rebind(ElectraForPreTraining.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForPreTraining.forward, ElectraMoeForPreTrainingOutput)


class ElectraMoeForMaskedLM(ElectraMoePreTrainedModel, ElectraForMaskedLM):
    __init__ = rebind(ElectraForMaskedLM.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForMaskedLM.forward, MoeMaskedLMOutput)


class ElectraMoeForCausalLM(ElectraMoePreTrainedModel, ElectraForCausalLM, GenerationMixin):
    __init__ = rebind(ElectraForCausalLM.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForCausalLM.forward, MoeCausalLMOutputWithCrossAttentions)


class ElectraMoeForSequenceClassification(ElectraMoePreTrainedModel, ElectraForSequenceClassification):
    __init__ = rebind(ElectraForSequenceClassification.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForSequenceClassification.forward, MoeSequenceClassifierOutput)


class ElectraMoeForMultipleChoice(ElectraMoePreTrainedModel, ElectraForMultipleChoice):
    __init__ = rebind(ElectraForMultipleChoice.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForMultipleChoice.forward, MoeMultipleChoiceModelOutput)


class ElectraMoeForTokenClassification(ElectraMoePreTrainedModel, ElectraForTokenClassification):
    __init__ = rebind(ElectraForTokenClassification.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForTokenClassification.forward, MoeTokenClassifierOutput)


class ElectraMoeForQuestionAnswering(ElectraMoePreTrainedModel, ElectraForQuestionAnswering):  # type: ignore[misc]
    __init__ = rebind(ElectraForQuestionAnswering.__init__, ElectraModel=ElectraMoeModel)
    forward = head_forward(ElectraForQuestionAnswering.forward, MoeQuestionAnsweringModelOutput)


__all__ = [
    "ElectraMoeConfig",
    "ElectraMoeForCausalLM",
    "ElectraMoeForMaskedLM",
    "ElectraMoeForMultipleChoice",
    "ElectraMoeForPreTraining",
    "ElectraMoeForQuestionAnswering",
    "ElectraMoeForSequenceClassification",
    "ElectraMoeForTokenClassification",
    "ElectraMoeModel",
    "ElectraMoePreTrainedModel",
]
