"""Llama (Touvron et al. 2023, arXiv 2302.13971): pre-norm decoder, gated feed-forward network, biases optional."""

from hf_moe.modeling.configuration_llama_moe import LlamaMoeConfig

from .family import Family

LLAMA = Family(
    config_class=LlamaMoeConfig,
    layer="layers.{layer}",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
    norm="post_attention_layernorm",
    dropped={r"rotary_emb\.inv_freq$": "constant frequencies, which the model makes itself"},
)
