"""GPT-2 (Radford et al. 2019): pre-norm decoder, plain feed-forward network with biases, stored transposed."""

from hf_moe.modeling.configuration_gpt2_moe import GPT2MoeConfig

from .family import Family

GPT2 = Family(
    config_class=GPT2MoeConfig,
    layer="h.{layer}",
    up="mlp.c_fc",
    down="mlp.c_proj",
    norm="ln_2",
    transposed=True,
    dropped={r"\.attn\.(bias|masked_bias)$": "a constant causal mask, which the model makes itself"},
)
