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

from .moe_router_kinds import ROUTERS

# What an expert that is never chosen has for a logit: its probability is exactly 0, and nothing becomes NaN.
NEVER = -1e30


class ForwardPass(NamedTuple):
    """What a body tells its routers for one forward pass, where they need more than hidden states.

    Args:
        token_mask: number of tokens -> (T,) which of them are real; None where nobody says.
        counts: whether assignments are counted; not where checkpointing computes a layer again.
    """

    token_mask: Callable[[int], torch.Tensor | None]
    counts: bool


class TopKRouter(nn.Module):
    """A linear router of the kind `config.router_type` (see `moe_router_kinds.ROUTERS`).

    Logits and gates are computed in float32 whatever the model's dtype, and in float64 for float64 inputs.
    With `norm_topk_prob` the chosen gates are rescaled to sum to 1; with `router_detach_normalizer` their sum gets no
    gradient, so that a router of equal experts has one too. In training, `router_jitter_noise` multiplies the
    router's input (never the experts') by uniform noise (Fedus et al. 2021, arXiv 2101.03961, section 2.4).

    With `router_group_size` G, experts e·G … e·G + G - 1 are taken or left together ("virtual groups", He et al. 2024,
    arXiv 2410.07524, section 3): the mean of their rows is the group's, so rows that start equal stay equal, and each
    gets a G-th of its gate.

    `disabled` experts have no row: the others are chosen, and their gates made, as in a router without them. Their
    logits are `NEVER`.
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
        self.disabled: tuple[int, ...] = ()
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
            mask_T = None if self.forward_pass is None else self.forward_pass.token_mask(x_TD.shape[0])
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

    @property
    def num_enabled(self) -> int:
        return self.num_experts - len(self.disabled)

    @property
    def enabled(self) -> list[int]:
        """The experts that can be chosen; whole groups of them."""
        return [expert for expert in range(self.num_experts) if expert not in self.disabled]

    def rows(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(E, …) of experts -> (R, …) of groups that can be chosen."""
        weight = weight.to(dtype)
        if self.disabled:
            weight = weight[self.enabled]
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
        """The same of experts, where they were of groups, and of all where some can't be chosen."""
        G, logits_TE = self.group_size, logits_TR
        if G > 1:
            members_G = torch.arange(G, device=index_TK.device)
            index_TK = (index_TK[..., None] * G + members_G).clamp(max=self.num_enabled).flatten(1)
            logits_TE, gates_TK = logits_TR.repeat_interleave(G, 1), (gates_TK / G).repeat_interleave(G, 1)
        if self.disabled:
            enabled = torch.tensor([*self.enabled, self.num_experts], device=index_TK.device)
            all_TE = logits_TE.new_full((logits_TE.shape[0], self.num_experts), NEVER)
            logits_TE, index_TK = all_TE.index_copy(1, enabled[:-1], logits_TE), enabled[index_TK]
        return logits_TE, gates_TK, index_TK

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
    chosen_TE = torch.zeros(index_TK.shape[0], num_experts + 1, dtype=torch.long, device=index_TK.device)
    return chosen_TE.scatter(1, index_TK, 1)[:, :num_experts]
