"""Where tokens meet experts: the router, the experts, the block that joins them, and the losses that keep them in use.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.utils.generic import maybe_autocast


class TopKRouter(nn.Module):
    """Softmax, then top-k (Shazeer et al. 2017, arXiv 1701.06538, section 2; order as in Mixtral, arXiv 2401.04088).

    Logits and gates are computed in float32 whatever the model's dtype, and in float64 for float64 inputs.
    With `norm_topk_prob` the chosen gates are rescaled to sum to 1. In training, `router_jitter_noise` multiplies
    the router's input (never the experts') by uniform noise (Fedus et al. 2021, arXiv 2101.03961, section 2.4).
    """

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.norm_topk_prob = config.norm_topk_prob
        self.jitter_noise = config.router_jitter_noise
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`hidden_states` (T, D) -> logits (T, E), gates (T, K), expert indices (T, K)."""
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with maybe_autocast(device_type=hidden_states.device.type, enabled=False):
            x_TD = hidden_states.to(dtype)
            if self.training and self.jitter_noise > 0:
                x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - self.jitter_noise, 1 + self.jitter_noise)
            logits_TE = functional.linear(x_TD, self.weight.to(dtype))
            probs_TE = logits_TE.softmax(dim=-1)
            gates_TK, index_TK = probs_TE.topk(self.top_k, dim=-1)
            if self.norm_topk_prob:
                gates_TK = gates_TK / gates_TK.sum(dim=-1, keepdim=True)
        return logits_TE, gates_TK, index_TK


def _activation(name: str, dropout: float) -> nn.Module:
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
            if token.numel() == 0:
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
        self.act_fn = _activation(hidden_act, activation_dropout)

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
        if self.config._experts_implementation == "grouped_mm" and not self._grouped_mm_fits(hidden_states.dtype):
            return self.loop(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _grouped_mm_fits(self, dtype: torch.dtype) -> bool:
        """The kernel has no float64, and wants every row to start on a 16-byte boundary."""
        row_bytes = (self.hidden_dim * dtype.itemsize, self.intermediate_dim * dtype.itemsize)
        return dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


class SharedExpert(nn.Module):
    """The expert that every token visits, of width `shared_expert_intermediate_size`; arguments as in `MoeExperts`."""

    def __init__(self, config, *, hidden_act: str, gated: bool, bias: bool, activation_dropout: float):
        super().__init__()
        D, F = config.hidden_size, config.shared_expert_intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=bias) if gated else None
        self.up_proj = nn.Linear(D, F, bias=bias)
        self.down_proj = nn.Linear(F, D, bias=bias)
        self.act_fn = _activation(hidden_act, activation_dropout)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        h_TF = self.up_proj(x_TD)
        h_TF = self.act_fn(h_TF) if self.gate_proj is None else self.act_fn(self.gate_proj(x_TD)) * h_TF
        return self.down_proj(h_TF)


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
        network: dict[str, Any] = {
            "hidden_act": hidden_act,
            "gated": gated,
            "bias": bias,
            "activation_dropout": activation_dropout,
        }
        self.experts = MoeExperts(config, **network)
        self.shared_expert = SharedExpert(config, **network) if config.shared_expert_intermediate_size else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, gates_TK, index_TK = self.gate(x_TD)
        y_TD = self.experts(x_TD, index_TK, gates_TK)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        return self.dropout(y_TD.view_as(hidden_states))


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
