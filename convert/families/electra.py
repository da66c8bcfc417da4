"""ELECTRA (Clark et al. 2020, arXiv 2003.10555): BERT's layer."""

from dataclasses import replace

from hf_moe.modeling.configuration_electra_moe import ElectraMoeConfig

from .bert import BERT

ELECTRA = replace(BERT, config_class=ElectraMoeConfig)
