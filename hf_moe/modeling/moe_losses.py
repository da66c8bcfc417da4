"""Losses that keep experts in use.

Each is computed **per layer**, then averaged over the layers. (Pooling the layers first, as Transformers'
`load_balancing_loss_func` does, scores layers that collapsed onto different experts as balanced.)

Letters in names: L mixture layers, B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen.
"""

import torch
from torch import distributed

from .moe_router_kinds import router_probs
from .moe_routers import chosen


def load_balancing_loss(
    router_logits: tuple[torch.Tensor, ...],
    top_k: int,
    token_mask: torch.Tensor | None = None,
    *,
    router_index: tuple[torch.Tensor, ...] | None = None,
    router_type: str = "softmax",
    over_processes: bool = False,
) -> torch.Tensor:
    """Switch load balance (arXiv 2101.03961, eq. 4-6): E · Σ_e (share of assignments)·(mean probability), times K.

    K when every layer is balanced, E when every layer sends all its tokens to the same K experts.

    Args:
        router_logits: one (T, E) tensor a layer.
        top_k: K, the experts chosen a token; not read where `router_index` is given.
        token_mask: (T,), True where a token counts; padding must be False.
        router_index: one (T, K) tensor a layer, what was chosen; E where nothing was. By default the K largest logits.
        router_type: the routers' kind, whose scores are the probabilities.
        over_processes: whether shares are those of all processes together ("global-batch", Qiu et al. 2025,
            arXiv 2501.11873). The loss averaged over processes, as their gradients are, is then that of one process
            with the joined batch. Every process must call this, with as many layers.
    """
    if not router_logits:
        return torch.zeros(())
    if router_index is None:
        router_index = tuple(logits_TE.topk(top_k, dim=-1).indices for logits_TE in router_logits)
    E, device = router_logits[0].shape[1], router_logits[-1].device
    loads = [_token_sum(chosen(index_TK, E), token_mask).to(device) for index_TK in router_index]
    probs = [_token_sum(router_probs(logits_TE, router_type), token_mask).to(device) for logits_TE in router_logits]
    load_LE, probs_LE = torch.stack(loads).to(probs[0].dtype), torch.stack(probs)
    tokens = _num_tokens(router_logits[-1], token_mask)
    processes = 1
    if over_processes and distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(load_LE)
        distributed.all_reduce(tokens)
        processes = distributed.get_world_size()
    tokens = tokens.clamp(min=1)
    return ((load_LE / tokens) * (probs_LE / tokens * processes)).sum(dim=1).mean() * E


def mean_over_processes(value: torch.Tensor) -> torch.Tensor:
    """The mean of a number that needs no gradient, over all processes, each of which must call this."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return value
    total = value.detach().clone()
    distributed.all_reduce(total)
    return total / distributed.get_world_size()


def router_z_loss(router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Mean squared log-partition of the router (ST-MoE, arXiv 2202.08906, eq. 5), averaged over tokens, then layers.

    Arguments as in `load_balancing_loss`.
    """
    return _layer_mean([_token_mean(logits_TE.logsumexp(dim=-1) ** 2, token_mask) for logits_TE in router_logits])


def router_entropy(
    router_logits: tuple[torch.Tensor, ...], token_mask: torch.Tensor | None = None, *, router_type: str = "softmax"
) -> torch.Tensor:
    """Mean entropy of a token's probabilities, in nats, averaged over tokens, then layers: 0 where every token is sure
    of one expert, log E where all are alike to it (the local entropy of LIMoE, Mustafa et al. 2022, arXiv
    2206.02770).

    Arguments as in `load_balancing_loss`.
    """
    probs = (router_probs(logits_TE, router_type) for logits_TE in router_logits)
    # above 0, where the gradient would be infinite
    entropies = (torch.special.entr(p_TE.clamp(min=torch.finfo(p_TE.dtype).tiny)).sum(dim=-1) for p_TE in probs)
    return _layer_mean([_token_mean(entropy_T, token_mask) for entropy_T in entropies])


def refuse_nonfinite(router_logits: tuple[torch.Tensor, ...], layers: list[int], token_mask: torch.Tensor | None):
    """Checks all layers at once, so that an accelerator is waited for once; not while one records a graph.

    Args:
        router_logits, token_mask: as in `load_balancing_loss`.
        layers: their indices; others than the routers' where some were skipped, and then none is named.

    Raises:
        FloatingPointError: where a real token has a logit of NaN or Inf, naming the first such layer.
    """
    if not router_logits:
        return
    device = router_logits[-1].device
    if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    bad = [
        _token_sum(~logits_TE.detach().isfinite().all(dim=-1), token_mask).to(device) for logits_TE in router_logits
    ]
    counts = torch.stack(bad).tolist()
    first = next((position for position, count in enumerate(counts) if count), None)
    if first is None:
        return
    where = f"layer {layers[first]}" if len(layers) == len(counts) else "a layer"
    raise FloatingPointError(
        f"the router of {where} has logits of NaN or Inf for {int(counts[first])} of "
        f"{int(_num_tokens(router_logits[first], token_mask))} tokens: its weights or what comes before them are not "
        "finite. Go back to an earlier checkpoint, with a lower learning rate or gradients clipped."
    )


def _num_tokens(logits_TE: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    if token_mask is None:
        return logits_TE.new_ones(logits_TE.shape[0]).sum()
    return token_mask.to(logits_TE).sum()


def _token_sum(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Sum over the first dimension, of the tokens that count."""
    if token_mask is None:
        return values.sum(dim=0)
    real_T = token_mask.to(device=values.device, dtype=torch.bool)
    return values.where(real_T.view(-1, *[1] * (values.ndim - 1)), values.new_zeros(())).sum(dim=0)


def _token_mean(values: torch.Tensor, token_mask: torch.Tensor | None) -> torch.Tensor:
    """Mean over the first dimension, of the tokens that count."""
    tokens = values.shape[0] if token_mask is None else token_mask.to(values).sum().clamp(min=1)
    return _token_sum(values, token_mask) / tokens


def _layer_mean(losses: list[torch.Tensor]) -> torch.Tensor:
    """Layers may live on different devices; the mean is taken on the last one's, where the head is. 0 of no layers."""
    if not losses:
        return torch.zeros(())
    return torch.stack([loss.to(losses[-1].device) for loss in losses]).mean()
