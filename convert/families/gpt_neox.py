"""GPT-NeoX (Black et al. 2022, arXiv 2204.06745), Pythia: parallel residuals, each branch with a norm of its own."""

from hf_moe.modeling.configuration_gpt_neox_moe import GPTNeoXMoeConfig

from .family import Family

GPT_NEOX = Family(
    config_class=GPTNeoXMoeConfig,
    layer="layers.{layer}",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    norm="post_attention_layernorm",
    renamed={r"^embed_out\.weight$": "lm_head.weight"},
    dropped={
        r"\.attention\.(bias|masked_bias)$": "a constant causal mask, which the model makes itself",
        r"rotary_emb\.inv_freq$": "constant frequencies, which the model makes itself",
    },
)
