"""DistilBERT (Sanh et al. 2019, arXiv 1910.01108): post-norm encoder, plain feed-forward network with biases."""

from hf_moe.modeling.configuration_distilbert_moe import DistilBertMoeConfig

from .family import Family

DISTILBERT = Family(
    config_class=DistilBertMoeConfig,
    layer="transformer.layer.{layer}",
    up="ffn.lin1",
    down="ffn.lin2",
    norm="sa_layer_norm",
    block="ffn",
    dropped={r"embeddings\.position_ids$": "a constant buffer, which the model makes itself"},
)
