"""Losses that keep experts in use.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

import torch


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...], top_k: int, token_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Switch load balance (arXiv 2101.03961, eq. 4-6): E · Σ_e (share of assignments)·(mean probability), times K.

    Computed **per layer**, then averaged over the layers: K when every layer is balanced, E when every layer sends
    all its tokens to the same K experts. (Pooling the layers first, as Transformers' `load_balancing_loss_func`
    does, scores layers that collapsed onto different experts as balanced.)

    Args:
        router_logits: one (T, E) tensor a layer.
        top_k: K, the experts chosen a token.
        token_mask: (T,), True where a token counts; padding must be False.
    """
    losses = []
    for logits_TE in router_logits:
        probs_TE = logits_TE.softmax(dim=-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter_(1, logits_TE.topk(top_k, dim=-1).indices, 1.0)
        losses.append(
            (_token_mean(chosen_TE, token_mask) * _token_mean(probs_TE, token_mask)).sum() * logits_TE.shape[-1]
        )
    return _layer_mean(losses)


def router_z_loss(router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5), averaged over tokens, then layers.

    Arguments as in `load_balancing_loss`.
    """
    return _layer_mean([_token_mean(logits_TE.logsumexp(dim=-1) ** 2, token_mask) for logits_TE in router_logits])


def _token_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the first dimension, of the tokens that count."""
    if token_mask is None:
        return values.mean(dim=0)
    weight_T = token_mask.to(device=values.device, dtype=values.dtype)
    return (weight_T @ values) / weight_T.sum().clamp(min=1)


def _layer_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    """Layers may live on different devices; the mean is taken on the last one's, where the head is. 0 of no layers."""
    if not losses:
        return torch.zeros(())
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()
