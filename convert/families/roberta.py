"""RoBERTa (Liu et al. 2019, arXiv 1907.11692): BERT's layer."""

from dataclasses import replace

from hf_moe.modeling.configuration_roberta_moe import RobertaMoeConfig

from .bert import BERT

ROBERTA = replace(BERT, config_class=RobertaMoeConfig)
