"""The kinds of router: how logits are made, what scores they give, and which experts those choose.

Letters in names: T tokens, D hidden, E experts, K chosen, G experts that the router takes together, R = E / G groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.nn import functional


def _linear(router: Any, x_TD: torch.Tensor) -> torch.Tensor:
    return functional.linear(x_TD, router.rows(router.weight, x_TD.dtype))


def _noisy(router: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """In training with normal noise of learned deviation (eq. 4)."""
    logits_TR = _linear(router, x_TD)
    if not router.training:
        return logits_TR
    std_TR = functional.softplus(functional.linear(x_TD, router.rows(router.noise_weight, x_TD.dtype)))
    return logits_TR + torch.randn_like(logits_TR) * std_TR


def _minus_distance(router: Any, x_TD: torch.Tensor) -> torch.Tensor:
    """(Not by products, which leave nothing of small differences.)"""
    rows_RD = router.rows(router.weight, x_TD.dtype)
    if torch.compiler.is_exporting():  # ONNX has no cdist
        return -torch.linalg.vector_norm(x_TD[:, None] - rows_RD, dim=-1)
    return -torch.cdist(x_TD, rows_RD, compute_mode="donot_use_mm_for_euclid_dist")


def _softmax(logits_TR: torch.Tensor) -> torch.Tensor:
    return logits_TR.softmax(dim=-1)


def _top_k(router: Any, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """The K / G groups of the highest scores; the selection bias counts here and nowhere else."""
    if router.e_score_correction_bias is not None:
        scores_TR = scores_TR + router.rows(router.e_score_correction_bias, scores_TR.dtype)
    return scores_TR.topk(router.top_k // router.group_size, dim=-1).indices


def _top_p(router: Any, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """The fewest groups whose probabilities sum to p or more."""
    sorted_TR, index_TR = scores_TR.sort(dim=-1, descending=True, stable=True)
    before_TR = sorted_TR.cumsum(dim=-1) - sorted_TR
    return index_TR.masked_fill(before_TR >= router.top_p, scores_TR.shape[1])


def _expert_choice(router: Any, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Every group takes the tokens that score highest with it, `capacity_factor` · T / E of them, rounded up."""
    tokens, R = scores_TR.shape
    real_T = torch.ones(tokens, dtype=torch.bool, device=scores_TR.device) if mask_T is None else mask_T.bool()
    real_T1 = real_T.to(scores_TR.device)[:, None]
    places = (real_T1.sum() * (router.capacity_factor / router.num_enabled)).ceil()
    order_TR = scores_TR.masked_fill(~real_T1, -1.0).sort(dim=0, descending=True, stable=True).indices
    taken_TR = (order_TR.argsort(dim=0) < places) & real_T1
    return torch.arange(R, device=scores_TR.device).expand(tokens, R).masked_fill(~taken_TR, R)


class RouterKind(NamedTuple):
    """Args:
    logits: router, inputs (T, D) -> (T, R).
    scores: logits -> (T, R), what gates are made of.
    choose: router, scores without gradient, (T,) which tokens are real -> (T, slots) groups; R for an empty slot.
    leaves_slots_empty: whether there are such slots.
    has_selection_bias: whether a bias, moved by `update_router_bias`, is added to the scores for the choice.
    is_noisy: whether it has weights of its own for noise.
    """

    logits: Callable[[Any, torch.Tensor], torch.Tensor]
    scores: Callable[[torch.Tensor], torch.Tensor]
    choose: Callable[[Any, torch.Tensor, torch.Tensor | None], torch.Tensor]
    leaves_slots_empty: bool = False
    has_selection_bias: bool = False
    is_noisy: bool = False


# `router_type` -> what it is; sources:
# softmax: Shazeer et al. 2017 (arXiv 1701.06538, section 2); order as in Mixtral (arXiv 2401.04088).
# sigmoid: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2); its bias: Wang et al. 2024 (arXiv 2408.15664).
# noisy: Shazeer et al. 2017, eq. 3-5.
# top_p: Huang et al. 2024 (arXiv 2403.07652).
# expert_choice: Zhou et al. 2022 (arXiv 2202.09368, section 3.2).
# laplace: Han et al. 2024 (FuseMoE, arXiv 2402.03226): softmax over -‖x - row‖.
ROUTERS: dict[str, RouterKind] = {
    "softmax": RouterKind(_linear, _softmax, _top_k),
    "sigmoid": RouterKind(_linear, torch.sigmoid, _top_k, has_selection_bias=True),
    "noisy": RouterKind(_noisy, _softmax, _top_k, is_noisy=True),
    "top_p": RouterKind(_linear, _softmax, _top_p, leaves_slots_empty=True),
    "expert_choice": RouterKind(_linear, _softmax, _expert_choice, leaves_slots_empty=True),
    "laplace": RouterKind(_minus_distance, _softmax, _top_k),
}


def router_probs(logits_TE: torch.Tensor, router_type: str = "softmax") -> torch.Tensor:
    """The scores of a kind, as shares that sum to 1 for each token: what the losses are taken of."""
    scores_TE = ROUTERS[router_type].scores(logits_TE)
    return scores_TE / scores_TE.sum(dim=-1, keepdim=True)
