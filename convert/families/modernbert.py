"""ModernBERT (Warner et al. 2024, arXiv 2412.13663): pre-norm encoder, gated feed-forward network, biases optional.

One projection holds gate and up, in this order: the first half of its output is what the activation is applied to.
"""

from hf_moe.modeling.configuration_modernbert_moe import ModernBertMoeConfig

from .family import Family

MODERNBERT = Family(
    config_class=ModernBertMoeConfig,
    layer="layers.{layer}",
    gate="mlp.Wi",
    up="mlp.Wi",
    down="mlp.Wo",
    norm="mlp_norm",
)
