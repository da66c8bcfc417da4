"""Mistral (Jiang et al. 2023, arXiv 2310.06825): Llama's layer, sliding window."""

from dataclasses import replace

from hf_moe.modeling.configuration_mistral_moe import MistralMoeConfig

from .llama import LLAMA

MISTRAL = replace(LLAMA, config_class=MistralMoeConfig)
