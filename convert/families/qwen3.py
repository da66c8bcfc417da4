"""Qwen3 (Yang et al. 2025, arXiv 2505.09388): Llama's layer, queries and keys normalised."""

from dataclasses import replace

from hf_moe.modeling.configuration_qwen3_moe import Qwen3UpcycledMoeConfig

from .llama import LLAMA

QWEN3 = replace(LLAMA, config_class=Qwen3UpcycledMoeConfig)
