"""GPT-J (Wang and Komatsuzaki 2021): attention and a plain feed-forward network side by side, behind one norm."""

from hf_moe.modeling.configuration_gptj_moe import GPTJMoeConfig

from .family import Family

GPTJ = Family(
    config_class=GPTJMoeConfig,
    layer="h.{layer}",
    up="mlp.fc_in",
    down="mlp.fc_out",
    norm="ln_1",
    dropped={r"\.attn\.(bias|masked_bias)$": "a constant causal mask, which the model makes itself"},
)
