"""What mixtures return: the dense output with the router's fields."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import (
    BaseModelOutput,
    BaseModelOutputWithPast,
    BaseModelOutputWithPastAndCrossAttentions,
    BaseModelOutputWithPooling,
    BaseModelOutputWithPoolingAndCrossAttentions,
    CausalLMOutputWithCrossAttentions,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    MaskedLMOutput,
    MultipleChoiceModelOutput,
    NextSentencePredictorOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput


@dataclass
class RouterOutput(ModelOutput):
    """The fields that a mixture adds to an output.

    Args:
        aux_loss: load-balancing loss, unweighted, averaged over the layers.
        z_loss: router z-loss, likewise.
        router_entropy: mean entropy of a token's probabilities, in nats, likewise.
        router_logits: one (batch · sequence, num_experts) tensor a mixture layer, before the softmax.
    """

    aux_loss: torch.FloatTensor | None = None
    z_loss: torch.FloatTensor | None = None
    router_entropy: torch.FloatTensor | None = None
    router_logits: tuple[torch.FloatTensor, ...] | None = None


@dataclass
class MoeBaseModelOutput(RouterOutput, BaseModelOutput):
    """The dense body's output with the router's fields, as are the classes below for other bodies and the heads."""


@dataclass
class MoeBaseModelOutputWithPast(RouterOutput, BaseModelOutputWithPast):
    pass


@dataclass
class MoeBaseModelOutputWithPastAndCrossAttentions(RouterOutput, BaseModelOutputWithPastAndCrossAttentions):
    pass


@dataclass
class MoeBaseModelOutputWithPooling(RouterOutput, BaseModelOutputWithPooling):
    pass


@dataclass
class MoeBaseModelOutputWithPoolingAndCrossAttentions(RouterOutput, BaseModelOutputWithPoolingAndCrossAttentions):
    pass


@dataclass
class MoeCausalLMOutputWithCrossAttentions(RouterOutput, CausalLMOutputWithCrossAttentions):
    pass


@dataclass
class MoeCausalLMOutputWithPast(RouterOutput, CausalLMOutputWithPast):
    pass


@dataclass
class MoeImageClassifierOutput(RouterOutput, ImageClassifierOutput):
    pass


@dataclass
class MoeMaskedLMOutput(RouterOutput, MaskedLMOutput):
    pass


@dataclass
class MoeMultipleChoiceModelOutput(RouterOutput, MultipleChoiceModelOutput):
    pass


@dataclass
class MoeNextSentencePredictorOutput(RouterOutput, NextSentencePredictorOutput):
    pass


@dataclass
class MoeQuestionAnsweringModelOutput(RouterOutput, QuestionAnsweringModelOutput):
    pass


@dataclass
class MoeSequenceClassifierOutput(RouterOutput, SequenceClassifierOutput):
    pass


@dataclass
class MoeSequenceClassifierOutputWithPast(RouterOutput, SequenceClassifierOutputWithPast):
    pass


@dataclass
class MoeTokenClassifierOutput(RouterOutput, TokenClassifierOutput):
    pass
