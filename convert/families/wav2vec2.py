"""Wav2Vec2 (Baevski et al. 2020, arXiv 2006.11477): encoder of sound, norms before or behind its branches."""

from hf_moe.modeling.configuration_wav2vec2_moe import Wav2Vec2MoeConfig

from .family import Family

WAV2VEC2 = Family(
    config_class=Wav2Vec2MoeConfig,
    layer="encoder.layers.{layer}",
    up="feed_forward.intermediate_dense",
    down="feed_forward.output_dense",
    norm="layer_norm",
    block="feed_forward",
    inputs="input_values",
    renamed={
        r"\.weight_g$": ".parametrizations.weight.original0",
        r"\.weight_v$": ".parametrizations.weight.original1",
    },
    optional=(r"\bmasked_spec_embed$",),
    variants={("do_stable_layer_norm", True): {"norm": "final_layer_norm"}},
)
