"""Gemma 3, text only (Gemma Team 2025, arXiv 2503.19786): Gemma 2's layer, queries and keys normalised."""

from dataclasses import replace

from hf_moe.modeling.configuration_gemma3_text_moe import Gemma3TextMoeConfig

from .gemma2 import GEMMA2

GEMMA3_TEXT = replace(GEMMA2, config_class=Gemma3TextMoeConfig)
