"""Which experts a text is sent to."""

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel


@torch.no_grad()
def expert_load(model: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Share of assignments that each expert receives, padding left out.

    Args:
        model: one of our mixtures.
        batches: inputs of `model`, with `attention_mask` where there is padding.

    Returns:
        (mixture layers, experts), float64; each row sums to 1. `1 / num_experts` everywhere is perfect balance.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(len(model.config.moe_layer_indices), model.config.num_experts, dtype=torch.float64)
    for inputs in batches:
        router_logits = model(**inputs, output_router_logits=True).router_logits
        kept = model.token_mask(  # type: ignore[operator]
            inputs.get("attention_mask"), router_logits[0].shape[0]
        )
        for layer, logits_TE in enumerate(router_logits):
            if kept is not None:
                logits_TE = logits_TE[kept]
            chosen = logits_TE.topk(model.config.num_experts_per_tok, dim=-1).indices
            counts[layer] += torch.bincount(chosen.reshape(-1).cpu(), minlength=counts.shape[1])
    model.train(training)
    return counts / counts.sum(dim=1, keepdim=True)
