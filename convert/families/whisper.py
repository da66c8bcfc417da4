"""Whisper (Radford et al. 2022, arXiv 2212.04356): its encoder, pre-norm, plain feed-forward network with biases."""

from hf_moe.modeling.configuration_whisper_moe import WhisperMoeConfig

from .family import Family

WHISPER = Family(
    config_class=WhisperMoeConfig,
    layer="layers.{layer}",
    up="fc1",
    down="fc2",
    norm="final_layer_norm",
    block="fc1",
    inputs="input_features",
    body="encoder",
    encoder_of=("WhisperModel", "WhisperForConditionalGeneration"),
    renamed={r"^(model\.)?encoder\.": ""},
    dropped={r"^(model\.)?decoder\.|^proj_out\.": "the decoder's; the mixture is an encoder"},
)
