"""OPT (Zhang et al. 2022, arXiv 2205.01068): decoder whose layer runs its plain feed-forward network itself."""

from hf_moe.modeling.configuration_opt_moe import OPTMoeConfig

from .family import Family

OPT = Family(
    config_class=OPTMoeConfig,
    layer="decoder.layers.{layer}",
    up="fc1",
    down="fc2",
    norm="final_layer_norm",
    variants={("do_layer_norm_before", False): {"norm": "self_attn_layer_norm"}},
)
