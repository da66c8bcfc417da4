"""GPT-Neo (Black et al. 2021): GPT-2's layer, its projections not transposed, every other attention local."""

from hf_moe.modeling.configuration_gpt_neo_moe import GPTNeoMoeConfig

from .family import Family

GPT_NEO = Family(
    config_class=GPTNeoMoeConfig,
    layer="h.{layer}",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_2",
    dropped={r"\.attn\.attention\.(bias|masked_bias)$": "a constant causal mask, which the model makes itself"},
)
