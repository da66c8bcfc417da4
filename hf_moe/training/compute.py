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
    share = experts_share(getattr(model, "config", None))
    total = trained = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in looked_up - tied:
            continue
        size = parameter.numel() * (share if "experts" in name.split(".") else 1.0)
        total += size
        trained += size * parameter.requires_grad
    return Active(total, trained)


def experts_share(config: Any) -> float:
    """K of E, the experts that a token visits; on average where experts choose, at most where their number varies."""
    E = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    K = getattr(config, "num_experts_per_tok", None)
    if not E or not K or getattr(config, "router_type", None) == "top_p":
        return 1.0
    return (config.router_capacity_factor if getattr(config, "router_type", None) == "expert_choice" else K) / E


def count_tokens(inputs: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding: by its masks (several where it holds pairs), else all ids."""
    masks = [value for name, value in inputs.items() if name.endswith("attention_mask")]
    if masks and all(isinstance(mask, torch.Tensor) and mask.ndim == 2 for mask in masks):
        return int(sum(mask.sum() for mask in masks))
    return sum(value.numel() for name, value in inputs.items() if name.endswith("input_ids"))
