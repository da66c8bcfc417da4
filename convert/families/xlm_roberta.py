"""XLM-RoBERTa (Conneau et al. 2019, arXiv 1911.02116): BERT's layer."""

from dataclasses import replace

from hf_moe.modeling.configuration_xlm_roberta_moe import XLMRobertaMoeConfig

from .bert import BERT

XLM_ROBERTA = replace(BERT, config_class=XLMRobertaMoeConfig)
