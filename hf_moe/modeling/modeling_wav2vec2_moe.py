"""Wav2Vec2 with a mixture of experts in the place of its feed-forward networks: models."""

from dataclasses import dataclass

from transformers.modeling_outputs import CausalLMOutput, Wav2Vec2BaseModelOutput, XVectorOutput
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2ForAudioFrameClassification,
    Wav2Vec2ForCTC,
    Wav2Vec2ForPreTraining,
    Wav2Vec2ForPreTrainingOutput,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2ForXVector,
    Wav2Vec2Model,
    Wav2Vec2PreTrainedModel,
)

from .configuration_wav2vec2_moe import Wav2Vec2MoeConfig
from .modeling_moe import MoePreTrainedModelMixin, body_forward, head_forward, rebind
from .moe_layers import MoeBlock
from .moe_outputs import MoeSequenceClassifierOutput, MoeTokenClassifierOutput, RouterOutput


@dataclass
class MoeWav2Vec2BaseModelOutput(RouterOutput, Wav2Vec2BaseModelOutput):
    pass


@dataclass
class Wav2Vec2MoeForPreTrainingOutput(RouterOutput, Wav2Vec2ForPreTrainingOutput):
    pass


@dataclass
class MoeCTCOutput(RouterOutput, CausalLMOutput):
    pass


@dataclass
class MoeXVectorOutput(RouterOutput, XVectorOutput):
    pass


class Wav2Vec2MoePreTrainedModel(MoePreTrainedModelMixin, Wav2Vec2PreTrainedModel):
    config: Wav2Vec2MoeConfig
    config_class = Wav2Vec2MoeConfig

    def token_mask(self, attention_mask, num_tokens):
        """The mask is over samples, of which many make a frame."""
        if attention_mask is not None:
            frames = num_tokens // attention_mask.shape[0]
            attention_mask = self._get_feature_vector_attention_mask(frames, attention_mask, add_adapter=False)
        return super().token_mask(attention_mask, num_tokens)


class Wav2Vec2MoeModel(Wav2Vec2MoePreTrainedModel, Wav2Vec2Model):
    forward = body_forward(Wav2Vec2Model.forward, MoeWav2Vec2BaseModelOutput)

    def post_init(self):
        config, layers = self.config, self.encoder.layers
        for index in config.moe_layer_indices:  # the dense layers do not know their index
            layers[index].feed_forward = MoeBlock(
                config,
                hidden_act=config.hidden_act,
                dropout=config.hidden_dropout,
                activation_dropout=config.activation_dropout,
            )
        self._no_split_modules = [type(layers[0]).__name__]  # one of two forms
        super().post_init()


class Wav2Vec2MoeForPreTraining(Wav2Vec2MoePreTrainedModel, Wav2Vec2ForPreTraining):
    __init__ = rebind(Wav2Vec2ForPreTraining.__init__, Wav2Vec2Model=Wav2Vec2MoeModel)
    forward = head_forward(Wav2Vec2ForPreTraining.forward, Wav2Vec2MoeForPreTrainingOutput)


class Wav2Vec2MoeForCTC(Wav2Vec2MoePreTrainedModel, Wav2Vec2ForCTC):
    __init__ = rebind(Wav2Vec2ForCTC.__init__, Wav2Vec2Model=Wav2Vec2MoeModel)
    forward = head_forward(Wav2Vec2ForCTC.forward, MoeCTCOutput)

    @property
    def _loss_is_a_sum(self):
        return self.config.ctc_loss_reduction == "sum"


class Wav2Vec2MoeForSequenceClassification(Wav2Vec2MoePreTrainedModel, Wav2Vec2ForSequenceClassification):
    __init__ = rebind(Wav2Vec2ForSequenceClassification.__init__, Wav2Vec2Model=Wav2Vec2MoeModel)
    forward = head_forward(Wav2Vec2ForSequenceClassification.forward, MoeSequenceClassifierOutput)


class Wav2Vec2MoeForAudioFrameClassification(Wav2Vec2MoePreTrainedModel, Wav2Vec2ForAudioFrameClassification):
    __init__ = rebind(Wav2Vec2ForAudioFrameClassification.__init__, Wav2Vec2Model=Wav2Vec2MoeModel)
    forward = head_forward(Wav2Vec2ForAudioFrameClassification.forward, MoeTokenClassifierOutput)


class Wav2Vec2MoeForXVector(Wav2Vec2MoePreTrainedModel, Wav2Vec2ForXVector):
    __init__ = rebind(Wav2Vec2ForXVector.__init__, Wav2Vec2Model=Wav2Vec2MoeModel)
    forward = head_forward(Wav2Vec2ForXVector.forward, MoeXVectorOutput)


__all__ = [
    "Wav2Vec2MoeConfig",
    "Wav2Vec2MoeForAudioFrameClassification",
    "Wav2Vec2MoeForCTC",
    "Wav2Vec2MoeForPreTraining",
    "Wav2Vec2MoeForSequenceClassification",
    "Wav2Vec2MoeForXVector",
    "Wav2Vec2MoeModel",
    "Wav2Vec2MoePreTrainedModel",
]
