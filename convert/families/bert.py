"""BERT (Devlin et al. 2018, arXiv 1810.04805): post-norm encoder, plain feed-forward network with biases."""

from hf_moe.modeling.configuration_bert_moe import BertMoeConfig

from .family import Family

BERT = Family(
    config_class=BertMoeConfig,
    layer="encoder.layer.{layer}",
    up="intermediate.dense",
    down="output.dense",
    norm="attention.output.LayerNorm",
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    dropped={r"embeddings\.(position|token_type)_ids$": "a constant buffer, which the model makes itself"},
)
