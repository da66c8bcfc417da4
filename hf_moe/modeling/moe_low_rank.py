"""Experts that share one network and differ from it by matrices of low rank.

Letters in names: T tokens, K chosen, D hidden, E experts, F expert width, R rank, I and O in and out of a projection.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .moe_experts import activation


class LowRankExperts(nn.Module):
    """Expert e has the projections W + B_e A_e, where W is of all experts (Li et al. 2024, "MixLoRA", arXiv
    2404.15159, section 3.1; parameter-efficient upcycling: Wu et al. 2024, arXiv 2401.02731).

    A token costs one feed-forward network, however many experts it visits: what they share is multiplied once, W_down
    after their activations are summed by their gates. To this come the factors of *all* experts, masked where a token
    does not visit them: plain matrix products on every device, cheap while E·R is small beside D.

    The shared network is `MoeExperts`' with one expert: `up_proj` (1, F, D) or `gate_up_proj` (1, 2F, D), `down_proj`
    (1, D, F), their biases. Beside each matrix (1, O, I) stand `…_a` (E, R, I) and `…_b` (E, O, R), which starts at 0.
    """

    def __init__(
        self, config, *, hidden_act: str, gated: bool = False, bias: bool = True, activation_dropout: float = 0.0
    ):
        super().__init__()
        self.has_gate = gated
        self.num_experts = config.num_experts
        self.act_fn = activation(hidden_act, activation_dropout)
        E, R, D, F = config.num_experts, config.expert_rank, config.hidden_size, config.moe_intermediate_size
        self.up_name = "gate_up_proj" if gated else "up_proj"
        for name, width, inner in ((self.up_name, 2 * F if gated else F, D), ("down_proj", D, F)):
            self.register_parameter(name, nn.Parameter(torch.empty(1, width, inner)))
            self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(1, width)) if bias else None)
            self.register_parameter(f"{name}_a", nn.Parameter(torch.empty(E, R, inner)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.empty(E, width, R)))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """`hidden_states` (T, D), `top_k_index` and `top_k_weights` (T, K) -> (T, D). Slots of index E are empty."""
        own_TKE = top_k_index[..., None] == torch.arange(self.num_experts, device=top_k_index.device)
        gates_TKE = top_k_weights[..., None] * own_TKE

        h_TKF = self._shared(hidden_states, self.up_name, biased=True)[:, None]
        z_TER = self._into_rank(hidden_states, self.up_name)
        h_TKF = h_TKF + self._out_of_rank(z_TER[:, None] * own_TKE[..., None].to(z_TER.dtype), self.up_name)
        if self.has_gate:
            gate_TKF, h_TKF = h_TKF.chunk(2, dim=-1)
            h_TKF = self.act_fn(gate_TKF) * h_TKF
        else:
            h_TKF = self.act_fn(h_TKF)

        # what comes after the activation is linear: sums over the slots go first, in the gates' dtype
        h_TF = (h_TKF * gates_TKE.sum(-1, keepdim=True)).sum(1).to(h_TKF.dtype)
        z_TKER = self._into_rank(h_TKF, "down_proj")
        z_TER = (z_TKER * gates_TKE[..., None]).sum(1).to(z_TKER.dtype)
        y_TD = self._shared(h_TF, "down_proj", biased=False) + self._out_of_rank(z_TER, "down_proj")
        bias_1D: Any = self.down_proj_bias
        if bias_1D is not None:
            y_TD = y_TD + bias_1D * gates_TKE.sum((1, 2))[:, None]
        return y_TD.to(hidden_states.dtype)

    def _shared(self, x: torch.Tensor, name: str, *, biased: bool) -> torch.Tensor:
        bias: Any = getattr(self, f"{name}_bias") if biased else None
        return functional.linear(x, getattr(self, name)[0], None if bias is None else bias[0])

    def _into_rank(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """(…, I) -> (…, E, R), A_e x of every expert."""
        a_ERI = getattr(self, f"{name}_a")
        return functional.linear(x, a_ERI.flatten(0, 1)).unflatten(-1, a_ERI.shape[:2])

    def _out_of_rank(self, z: torch.Tensor, name: str) -> torch.Tensor:
        """(…, E, R) -> (…, O), the sum of B_e z_e."""
        b_EOR = getattr(self, f"{name}_b")
        return functional.linear(z.flatten(-2), b_EOR.transpose(0, 1).flatten(1))
