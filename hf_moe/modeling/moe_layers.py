"""The block that stands where a feed-forward network stood.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

from typing import Any

import torch
from torch import nn

from .moe_experts import MoeExperts, SharedExpert
from .moe_low_rank import LowRankExperts
from .moe_routers import TopKRouter


class MoeBlock(nn.Module):
    """Router and experts in the place of a feed-forward network; norm and residual stay outside.

    Where `shared_expert_intermediate_size` is not 0, a shared expert sees every token and its output is added, as in
    DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066, section 3.2).

    Args:
        config: a configuration with the fields of `MoeConfigMixin`.
        hidden_act: the dense network's activation, by its name in `ACT2FN`.
        gated: whether the dense network is gated (`down(act(gate(x)) * up(x))`).
        bias: whether its projections have biases.
        dropout: the dense network's own output dropout, applied once, after the experts are combined.
        activation_dropout: that of its activations, in each expert.
    """

    def __init__(
        self,
        config,
        *,
        hidden_act: str,
        gated: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        activation_dropout: float = 0.0,
    ):
        super().__init__()
        self.gate = TopKRouter(config)
        self.num_experts = config.num_experts  # of all processes
        self.leaves_slots_empty = self.gate.kind.leaves_slots_empty
        network: dict[str, Any] = {
            "hidden_act": hidden_act,
            "gated": gated,
            "bias": bias,
            "activation_dropout": activation_dropout,
        }
        self.experts = (LowRankExperts if config.expert_rank else MoeExperts)(config, **network)
        if self.leaves_slots_empty:
            # Transformers' implementations skip indices past the last expert only where they are told of such slots,
            # which its own models have under expert parallelism alone.
            self.experts._is_expert_parallel = True  # type: ignore[assignment]
        self.shared_expert = SharedExpert(config, **network) if config.shared_expert_intermediate_size else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates_TK, index_TK = self.gate(x_TD)
        if self.leaves_slots_empty and self.experts.num_experts < self.num_experts:
            # Expert parallelism sends every slot to some expert; an empty one's gate is 0.
            index_TK = index_TK.clamp(max=self.num_experts - 1)
        y_TD = self.experts(x_TD, index_TK, gates_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return self.dropout(y_TD.view_as(hidden_states))
