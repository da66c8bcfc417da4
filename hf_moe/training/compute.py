"""What a step costs, by a stated formula."""

from typing import Any, NamedTuple

import torch
from torch import nn

FORMULA = (
    "tokens · (4 · active + 2 · active that train): 2 a parameter and token forward, 2 backward through it, 2 for its "
    "own gradient. Active: all but embeddings that are looked up, and of a layer's E experts K. Attention's products "
    "of positions, and what gradient checkpointing computes again, are left out."
)


class Active(NamedTuple):
    """Parameters that one token is multiplied with.

    Args:
        all: of the whole model.
        trained: of them, those that train.
    """

    all: float
    trained: float

    def flops(self, tokens: int) -> float:
        """Of a forward and a backward pass (`FORMULA`)."""
        return tokens * (4 * self.all + 2 * self.trained)


def count_active(model: Any) -> Active:
    """Those of `model` as it is frozen now."""
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    tied = {id(head.weight)} if getattr(head, "weight", None) is not None else set()
    config = getattr(model, "config", None)
    total = trained = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up - tied:
            continue
        size = parameter.numel() * times(name, config)
        total += size
        trained += size * parameter.requires_grad
    return Active(total, trained)


def times(name: str, config: Any) -> float:
    """How often a token is multiplied with a parameter: K of E times with what is stacked by experts; with experts of
    low rank, which share a network and compute all factors, once or, beside their activations, K times."""
    if "experts" not in name.split("."):
        return 1.0
    E = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    K = _visited(config, E)
    if getattr(config, "expert_rank", 0):
        return K if name.endswith(("up_proj_b", "down_proj_a")) else 1.0
    return K / E


def _visited(config: Any, E: int) -> float:
    """K; on average where experts choose, and at most where their number varies."""
    kind = getattr(config, "router_type", None)
    if kind == "top_p":
        return E
    return config.router_capacity_factor if kind == "expert_choice" else getattr(config, "num_experts_per_tok", E)


def count_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding: by its masks (several where it holds pairs), else all ids."""
    masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
    if masks and all(isinstance(mask, torch.Tensor) and mask.ndim == 2 for mask in masks):
        return int(sum(mask.sum() for mask in masks))
    return sum(value.numel() for name, value in inputs.items() if name.endswith("input_ids"))
