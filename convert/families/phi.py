"""Phi (Li et al. 2023, arXiv 2309.05463): attention and a plain feed-forward network side by side, behind one norm."""

from hf_moe.modeling.configuration_phi_moe import PhiMoeConfig

from .family import Family

PHI = Family(
    config_class=PhiMoeConfig,
    layer="layers.{layer}",
    up="mlp.fc1",
    down="mlp.fc2",
    norm="input_layernorm",
    dropped={r"rotary_emb\.inv_freq$": "constant frequencies, which the model makes itself"},
)
