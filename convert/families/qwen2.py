"""Qwen2 (Yang et al. 2024, arXiv 2407.10671): Llama's layer, queries, keys and values with biases."""

from dataclasses import replace

from hf_moe.modeling.configuration_qwen2_moe import Qwen2UpcycledMoeConfig

from .llama import LLAMA

QWEN2 = replace(LLAMA, config_class=Qwen2UpcycledMoeConfig)
