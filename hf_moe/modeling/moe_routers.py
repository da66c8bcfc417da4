"""Which experts a token is sent to.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, G experts that the
router takes together, R = E / G such groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.utils.generic import maybe_autocast


class ForwardPass(NamedTuple):
    """What a body tells its routers for one forward pass, where they need more than hidden states.

    Args:
        token_mask: number of tokens -> (T,) which of them are real; None where nobody says.
        counts: whether assignments are counted; not where checkpointing computes a layer again.
    """

    token_mask: Callable[[int], torch.Tensor | None]
    counts: bool


class TopKRouter(nn.Module):
    """A linear router of the kind `config.router_type` (see `ROUTERS`).

    Logits and gates are computed in float32 whatever the model's dtype, and in float64 for float64 inputs.
    With `norm_topk_prob` the chosen gates are rescaled to sum to 1; with `router_detach_normalizer` their sum gets no
    gradient, so that a router of equal experts has one too. In training, `router_jitter_noise` multiplies the
    router's input (never the experts') by uniform noise (Fedus et al. 2021, arXiv 2101.03961, section 2.4).

    With `router_group_size` G, experts e·G … e·G + G - 1 are taken or left together ("virtual groups", He et al. 2024,
    arXiv 2410.07524, section 3): the mean of their rows is the group's, so rows that start equal stay equal, and each
    gets a G-th of its gate.
    """

    e_score_correction_bias: Any  # a tensor or None, as below
    noise_weight: Any

    def __init__(self, config):
        super().__init__()
        self.kind = ROUTERS[config.router_type]
        self.num_experts = config.num_experts
        self.group_size = config.router_group_size
        self.top_k = config.num_experts_per_tok
        self.top_p = config.router_top_p
        self.capacity_factor = config.router_capacity_factor
        self.norm_topk_prob = config.norm_topk_prob
        self.detach_normalizer = config.router_detach_normalizer
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        noise_weight = torch.empty_like(self.weight) if self.kind.is_noisy else None
        self.noise_weight = None if noise_weight is None else nn.Parameter(noise_weight)
        self.register_buffer(
            "e_score_correction_bias",
            torch.zeros(config.num_experts, dtype=torch.float32) if self.kind.has_selection_bias else None,
        )
        self.forward_pass: ForwardPass | None = None
        self.load_E: torch.Tensor | None = None  # no buffer: DistributedDataParallel would copy rank 0's to all

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states` (T, D) -> logits (T, E), gates (T, K), expert indices (T, K).

        Kinds that send tokens to different numbers of experts have up to E slots for K; an empty one has index E, one
        past the last expert, and gate 0.
        """
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            x_TD = hidden_states.to(dtype)
            mask_T = None if self.forward_pass is None else self.forward_pass.token_mask(len(x_TD))
            if self.training and self.jitter_noise > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits_TR = self.kind.logits(self, x_TD)
            scores_TR = self.kind.scores(logits_TR)
            index_TK = self.kind.choose(self, scores_TR.detach(), mask_T)
            gates_TK = self._gates(scores_TR, index_TK)
        logits_TE, gates_TK, index_TK = self._of_experts(logits_TR, gates_TK, index_TK)
        if self.forward_pass is not None and self.forward_pass.counts:
            self._count(index_TK, mask_T)
        return logits_TE, gates_TK, index_TK

    def rows(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(E, …) of experts -> (R, …) of groups."""
        weight = weight.to(dtype)
        return weight if self.group_size == 1 else weight.unflatten(0, (-1, self.group_size)).mean(dim=1)

    def _gates(self, scores_TR: torch.Tensor, index_TK: torch.Tensor) -> torch.Tensor:
        if self.kind.leaves_slots_empty:
            scores_TR = functional.pad(scores_TR, (0, 1))  # what an empty slot points at
        gates_TK = scores_TR.gather(1, index_TK)
        if not self.norm_topk_prob:
            return gates_TK
        total_T1 = gates_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(gates_TK.dtype).tiny)
        return gates_TK / (total_T1.detach() if self.detach_normalizer else total_T1)

    def _of_experts(self, logits_TR, gates_TK, index_TK):
        """The same of experts, where they were of groups."""
        G = self.group_size
        if G == 1:
            return logits_TR, gates_TK, index_TK
        members_G = torch.arange(G, device=index_TK.device)
        index_TKG = (index_TK[..., None] * G + members_G).clamp(max=self.num_experts)
        return logits_TR.repeat_interleave(G, 1), (gates_TK / G).repeat_interleave(G, 1), index_TKG.flatten(1)

    @torch.no_grad()
    def _count(self, index_TK: torch.Tensor, mask_T: torch.Tensor | None) -> None:
        chosen_TE = chosen(index_TK, self.num_experts)
        load_E = (chosen_TE if mask_T is None else chosen_TE * mask_T.to(chosen_TE.device)[:, None]).sum(dim=0)
        self.load_E = load_E if self.load_E is None else self.load_E.to(load_E.device) + load_E

    def _apply(self, fn, recurse=True):
        """The selection bias stays in float32: steps of 0.001 are lost in half precision."""
        bias_E = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias_E is not None and self.e_score_correction_bias.dtype != bias_E.dtype:
            self.e_score_correction_bias = bias_E.to(self.e_score_correction_bias.device)
        return self


def chosen(index_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Indices of experts -> (T, E), int64: 1 where a token is sent to an expert; empty slots count nowhere."""
    chosen_TE = torch.zeros(len(index_TK), num_experts + 1, dtype=torch.long, device=index_TK.device)
    return chosen_TE.scatter(1, index_TK, 1)[:, :num_experts]


def _linear(router: TopKRouter, x_TD: torch.Tensor) -> torch.Tensor:
    return functional.linear(x_TD, router.rows(router.weight, x_TD.dtype))


def _noisy(router: TopKRouter, x_TD: torch.Tensor) -> torch.Tensor:
    """In training with normal noise of learned deviation (eq. 4)."""
    logits_TR = _linear(router, x_TD)
    if not router.training:
        return logits_TR
    std_TR = functional.softplus(functional.linear(x_TD, router.rows(router.noise_weight, x_TD.dtype)))
    return logits_TR + torch.randn_like(logits_TR) * std_TR


def _minus_distance(router: TopKRouter, x_TD: torch.Tensor) -> torch.Tensor:
    """(Not by products, which leave nothing of small differences.)"""
    rows_RD = router.rows(router.weight, x_TD.dtype)
    return -torch.cdist(x_TD, rows_RD, compute_mode="donot_use_mm_for_euclid_dist")


def _softmax(logits_TR: torch.Tensor) -> torch.Tensor:
    return logits_TR.softmax(dim=-1)


def _top_k(router: TopKRouter, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """The K / G groups of the highest scores; the selection bias counts here and nowhere else."""
    if router.e_score_correction_bias is not None:
        scores_TR = scores_TR + router.rows(router.e_score_correction_bias, scores_TR.dtype)
    return scores_TR.topk(router.top_k // router.group_size, dim=-1).indices


def _top_p(router: TopKRouter, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """The fewest groups whose probabilities sum to p or more."""
    sorted_TR, index_TR = scores_TR.sort(dim=-1, descending=True, stable=True)
    before_TR = sorted_TR.cumsum(dim=-1) - sorted_TR
    return index_TR.masked_fill(before_TR >= router.top_p, scores_TR.shape[1])


def _expert_choice(router: TopKRouter, scores_TR: torch.Tensor, mask_T: torch.Tensor | None) -> torch.Tensor:
    """Every group takes the tokens that score highest with it, `capacity_factor` · T / E of them, rounded up."""
    tokens, R = scores_TR.shape
    real_T = torch.ones(tokens, dtype=torch.bool, device=scores_TR.device) if mask_T is None else mask_T.bool()
    real_T1 = real_T.to(scores_TR.device)[:, None]
    places = (real_T1.sum() * (router.capacity_factor / router.num_experts)).ceil()
    order_TR = scores_TR.masked_fill(~real_T1, -1.0).argsort(dim=0, descending=True, stable=True)
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
# top_p: Huang et al. 2024 (arXiv 2403.07652, section 3).
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
