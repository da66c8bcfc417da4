"""The experts: many feed-forward networks, each on the tokens that are sent to it.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .moe_sorted_mm import SORTED_MM, can_sort, grouped_mm_fits, sorted_mm_experts_forward


def activation(name: str, dropout: float) -> nn.Module:
    """Dropout of an activation; in gated networks of `act(gate) * up`, which comes to the same."""
    return nn.Sequential(ACT2FN[name], nn.Dropout(dropout)) if dropout else ACT2FN[name]


@use_experts_implementation(has_gate=False, has_bias=True)
class _DispatchedExperts(nn.Module):
    """Runs `config._experts_implementation` ("grouped_mm", "batched_mm", …), or the loop below for "eager"."""

    config: Any
    num_experts: int
    has_gate: bool
    has_bias: bool
    act_fn: Callable[[torch.Tensor], torch.Tensor]
    _apply_gate: Callable[[torch.Tensor], torch.Tensor]
    up_proj: nn.Parameter
    up_proj_bias: nn.Parameter
    gate_up_proj: nn.Parameter
    gate_up_proj_bias: nn.Parameter
    down_proj: nn.Parameter
    down_proj_bias: nn.Parameter

    def __init__(self, config):
        super().__init__()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_states, top_k_index, top_k_weights):
        """One expert after the other; runs every dtype and shape. Indices past the last expert are skipped."""
        output_TD = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            token, slot = torch.where(top_k_index == expert)
            if not torch.compiler.is_exporting() and token.numel() == 0:
                continue
            y_TD = self._expert(expert, hidden_states[token]) * top_k_weights[token, slot, None]
            output_TD.index_add_(0, token, y_TD.to(output_TD.dtype))
        return output_TD

    def _expert(self, expert, x_TD):
        up = self.gate_up_proj if self.has_gate else self.up_proj
        up_bias = self.gate_up_proj_bias if self.has_gate else self.up_proj_bias
        h_TF = functional.linear(x_TD, up[expert], up_bias[expert] if self.has_bias else None)
        h_TF = self._apply_gate(h_TF) if self.has_gate else self.act_fn(h_TF)
        return functional.linear(h_TF, self.down_proj[expert], self.down_proj_bias[expert] if self.has_bias else None)


class MoeExperts(_DispatchedExperts):
    """E feed-forward networks, fused in the layout of Transformers' `use_experts_implementation`.

    Plain: `up_proj` (E, F, D), `down_proj` (E, D, F). Gated: `gate_up_proj` (E, 2F, D), the gate's rows first.
    With `bias`: `up_proj_bias` (E, F) or `gate_up_proj_bias` (E, 2F), and `down_proj_bias` (E, D).
    """

    def __init__(
        self, config, *, hidden_act: str, gated: bool = False, bias: bool = True, activation_dropout: float = 0.0
    ):
        super().__init__(config)
        self.has_gate = gated
        self.has_bias = bias
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.act_fn = activation(hidden_act, activation_dropout)

        E, D, F = self.num_experts, self.hidden_dim, self.intermediate_dim
        up_name, up_width = ("gate_up_proj", 2 * F) if gated else ("up_proj", F)
        self.register_parameter(up_name, nn.Parameter(torch.empty(E, up_width, D)))
        self.down_proj = nn.Parameter(torch.empty(E, D, F))
        self.register_parameter(f"{up_name}_bias", nn.Parameter(torch.empty(E, up_width)) if bias else None)
        self.register_parameter("down_proj_bias", nn.Parameter(torch.empty(E, D)) if bias else None)

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` (T, D), `top_k_index` and `top_k_weights` (T, K) -> (T, D)."""
        implementation = self.config._experts_implementation
        fits = grouped_mm_fits(self, hidden_states.dtype)
        if implementation == SORTED_MM and (fits or can_sort(self, hidden_states)):
            # This file's function, whatever another version of it has registered since.
            return sorted_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if implementation in ("grouped_mm", SORTED_MM) and not fits:
            return self.loop(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)


class SharedExpert(nn.Module):
    """The expert that every token visits, of width `shared_expert_intermediate_size`; arguments as in `MoeExperts`."""

    def __init__(self, config, *, hidden_act: str, gated: bool, bias: bool, activation_dropout: float):
        super().__init__()
        D, F = config.hidden_size, config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=bias) if gated else None
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = activation(hidden_act, activation_dropout)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        h_TF = self.up_proj(x_TD)
        h_TF = self.act_fn(h_TF) if self.gate_proj is None else self.act_fn(self.gate_proj(x_TD)) * h_TF
        return self.down_proj(h_TF)
