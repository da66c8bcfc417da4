"""MPNet (Song et al. 2020, arXiv 2004.09297): BERT's feed-forward network, run without a hook of its own: the mixture
stands where `intermediate` does."""

from dataclasses import replace

from hf_moe.modeling.configuration_mpnet_moe import MPNetMoeConfig

from .bert import BERT

MPNET = replace(BERT, config_class=MPNetMoeConfig, norm="attention.LayerNorm", block="intermediate")
