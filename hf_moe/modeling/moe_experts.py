"""The experts: many feed-forward networks, each on the tokens that are sent to it.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

SORTED_MM = "sorted_mm"


def sorted_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for the CPU, for every module of `use_experts_implementation`.

    Assignments are sorted by expert, and every matrix product writes where its result belongs, gradients of the
    weights too: a loop over slices of a parameter makes, and adds up, a gradient of all of it for each expert.
    Elsewhere than on a CPU, and for torch.compile, it is `grouped_mm`.
    """
    experts: Any = self
    if not runs_sorted(hidden_states):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    if len(hidden_states) == 1 and not torch.is_grad_enabled():
        [picked] = top_k_index.tolist()
        if max(picked) < experts.num_experts:
            y_KD = _network(experts, hidden_states, _one_by_one, picked)
            return combine(y_KD, top_k_weights).to(hidden_states.dtype)
    order_S, place_S, bounds = sort_assignments(top_k_index, experts.num_experts)
    if not torch.is_grad_enabled():
        y_SD = _expert_by_expert(experts, hidden_states[order_S // top_k_index.shape[1]], bounds)
        return combine(y_SD[place_S], top_k_weights).to(hidden_states.dtype)
    x_SD = _Gather.apply(hidden_states, order_S, place_S, top_k_index.shape[1])
    y_SD = _network(experts, x_SD, _GroupedLinear.apply, bounds)
    return _Combine.apply(y_SD, top_k_weights, order_S, place_S).to(hidden_states.dtype)


def _network(experts: Any, x_SD: torch.Tensor, linear: Callable[..., torch.Tensor], whose: Any) -> torch.Tensor:
    """What the experts make of rows; `linear` (rows, weight (E, O, I), bias (E, O), `whose`) finds each row's own."""

    def project(x_SI: torch.Tensor, name: str) -> torch.Tensor:
        weight = getattr(experts, name)
        if torch.is_autocast_enabled("cpu"):
            weight = weight.to(torch.get_autocast_dtype("cpu"))
        weight_EOI = weight.transpose(-2, -1) if experts.is_transposed else weight
        bias_EO = getattr(experts, f"{name}_bias").to(weight.dtype) if experts.has_bias else None
        return linear(x_SI.to(weight.dtype), weight_EOI, bias_EO, whose)

    h_SF = project(x_SD, "gate_up_proj" if experts.has_gate else "up_proj")
    h_SF = experts._apply_gate(h_SF) if experts.has_gate else experts.act_fn(h_SF)
    y_SD = project(h_SF, "down_proj")
    return experts.post_expert_norm(y_SD) if experts.has_post_expert_norm else y_SD


def _expert_by_expert(experts: Any, x_SD: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    """What each expert makes of its rows, activations while they are in the cache; 0 behind the last expert's."""
    made = [
        _network(experts, x_SD[start:end], _of_one, expert)
        for expert, (start, end) in enumerate(pairwise(bounds))
        if start < end
    ]
    nobodys = len(x_SD) - bounds[-1]
    return torch.cat([*made, x_SD.new_zeros(nobodys, x_SD.shape[1])]) if nobodys or not made else torch.cat(made)


def _of_one(x: torch.Tensor, weight_EOI: torch.Tensor, bias_EO: torch.Tensor | None, expert: int) -> torch.Tensor:
    return functional.linear(x, weight_EOI[expert], None if bias_EO is None else bias_EO[expert])


def _one_by_one(
    x: torch.Tensor, weight_EOI: torch.Tensor, bias_EO: torch.Tensor | None, picked: list[int]
) -> torch.Tensor:
    """One token's experts (K, O): its row (1, I) by each of them, or theirs (K, I) each by its own."""
    rows = x.split(1) if len(x) > 1 else [x] * len(picked)
    return torch.cat([_of_one(row, weight_EOI, bias_EO, e) for row, e in zip(rows, picked, strict=True)])


def runs_sorted(hidden_states: torch.Tensor) -> bool:
    """Whether `sorted_mm` runs itself: the number of an expert's tokens must be known, which costs a GPU its queue and
    torch.compile its graph."""
    return hidden_states.device.type == "cpu" and not torch.compiler.is_compiling()


def sort_assignments(top_k_index: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """`top_k_index` (T, K) -> (S,) assignments in the order of their experts, S = T·K; (S,) where each of them is in
    that order; and where each expert's begin and end. Those of no expert (index E and above) come last."""
    expert_S = top_k_index.reshape(-1)
    order_S = expert_S.argsort(stable=True)
    place_S = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S)))
    counts = torch.bincount(expert_S, minlength=num_experts)[:num_experts]
    return order_S, place_S, [0, *counts.cumsum(0).tolist()]


def combine(y_SD: torch.Tensor, gates_TK: torch.Tensor) -> torch.Tensor:
    """Each token's K rows of `y`, in the tokens' order, times its gates, summed: (T, D) in the wider dtype."""
    dtype = torch.promote_types(y_SD.dtype, gates_TK.dtype)
    y_TKD = y_SD.to(dtype).unflatten(0, gates_TK.shape)
    return torch.bmm(gates_TK[:, None].to(dtype), y_TKD)[:, 0]


class _GroupedLinear(torch.autograd.Function):
    """`linear(x[start:end], weight[e], bias[e])` for each expert's rows; 0 behind the last expert's."""

    @staticmethod
    def forward(ctx, x_SI, weight_EOI, bias_EO, bounds):
        ctx.save_for_backward(x_SI, weight_EOI)
        ctx.bounds = bounds
        y_SO = x_SI.new_empty(len(x_SI), weight_EOI.shape[1])
        for expert, (start, end) in enumerate(pairwise(bounds)):
            rows, out, weight_IO = x_SI[start:end], y_SO[start:end], weight_EOI[expert].t()
            if bias_EO is None:
                torch.mm(rows, weight_IO, out=out)
            else:
                torch.addmm(bias_EO[expert], rows, weight_IO, out=out)
        y_SO[bounds[-1] :].zero_()
        return y_SO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SO):
        x_SI, weight_EOI = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        grad_SO = grad_SO.contiguous()
        x_grad: Any = torch.empty_like(x_SI) if wants_x else None
        weight_grad: Any = torch.empty_like(weight_EOI) if wants_weight else None
        bias_grad: Any = grad_SO.new_empty(weight_EOI.shape[:2]) if wants_bias else None
        for expert, (start, end) in enumerate(pairwise(ctx.bounds)):
            rows = grad_SO[start:end]
            if wants_x:
                torch.mm(rows, weight_EOI[expert], out=x_grad[start:end])
            if wants_weight:
                torch.mm(rows.t(), x_SI[start:end], out=weight_grad[expert])
            if wants_bias:
                torch.sum(rows, 0, out=bias_grad[expert])
        if wants_x:
            x_grad[ctx.bounds[-1] :].zero_()
        return x_grad, weight_grad, bias_grad, None


class _Gather(torch.autograd.Function):
    """Rows of `x` (T, D), each K times, in the order of their experts; gradients are gathered too, not scattered."""

    @staticmethod
    def forward(ctx, x_TD, order_S, place_S, top_k):
        ctx.place_S, ctx.top_k = place_S, top_k
        return x_TD.index_select(0, order_S // top_k)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD):
        return grad_SD.index_select(0, ctx.place_S).unflatten(0, (-1, ctx.top_k)).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Each token's K rows of `y` (S, D) times its gates (T, K), summed in the gates' dtype."""

    @staticmethod
    def forward(ctx, y_SD, gates_TK, order_S, place_S):
        ctx.save_for_backward(y_SD, gates_TK, order_S, place_S)
        return combine(y_SD.index_select(0, place_S), gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD):
        y_SD, gates_TK, order_S, place_S = ctx.saved_tensors
        grad_SD = grad_TD.index_select(0, order_S // gates_TK.shape[1])
        y_grad = (grad_SD * gates_TK.flatten()[order_S, None]).to(y_SD.dtype) if ctx.needs_input_grad[0] else None
        gates_grad = (grad_SD * y_SD).sum(1)[place_S].view_as(gates_TK) if ctx.needs_input_grad[1] else None
        return y_grad, gates_grad, None, None


ExpertsInterface.register(SORTED_MM, sorted_mm_experts_forward)


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
        # This file's function, whatever another version of it has registered since.
        if implementation == SORTED_MM and runs_sorted(hidden_states):
            return sorted_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if implementation in ("grouped_mm", SORTED_MM) and not self._grouped_mm_fits(hidden_states.dtype):
            return self.loop(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _grouped_mm_fits(self, dtype: torch.dtype) -> bool:
        """The kernel has no float64, and wants every row to start on a 16-byte boundary. (Widths are read off the
        tensors: under tensor parallelism a process has some of the neurons.)"""
        row_bytes = [width * dtype.itemsize for width in self.down_proj.shape[1:]]
        return dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


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
