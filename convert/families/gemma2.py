"""Gemma 2 (Gemma Team 2024, arXiv 2408.00118): gated, with norms before and after, which multiply by 1 + weight."""

from hf_moe.modeling.configuration_gemma2_moe import Gemma2MoeConfig

from .family import Family

GEMMA2 = Family(
    config_class=Gemma2MoeConfig,
    layer="layers.{layer}",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="pre_feedforward_layernorm",
    norm_offset=1.0,
)
