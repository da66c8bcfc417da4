"""How experts run on a CPU: sorted by expert, one after the other.

Letters in names: T tokens, D hidden, E experts, K chosen, F expert width, S = T·K assignments; I and O are what goes
into and comes out of a projection, R an expert's rows, A what an activation reads (F, or 2F with a gate).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, ExpertsInterface

SORTED_MM = "sorted_mm"

# Tokens below which `grouped_mm` is faster: weights are then read, and gradients written, for little to compute
# (`benchmarks/experts_speed.py`). But one token alone is not sorted. (How many experts there are does not count, so
# that disabled ones leave the others' outputs as they are, bit for bit.)
FEW_TOKENS = {"forward": 64, "training": 256}


def sorted_mm_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """An experts implementation for the CPU, for every module of `use_experts_implementation`.

    Assignments are sorted by expert, and each expert runs whole, forward and backward, so that its activations stay in
    the cache and below the size that an allocator maps anew each time. Gradients of the weights are written where they
    belong: a loop over slices of a parameter makes, and adds up, a gradient of all of it for each expert.
    Where it can't run (`can_sort`), and for few tokens, it is `grouped_mm`.
    """
    experts: Any = self
    fits = grouped_mm_fits(experts, hidden_states.dtype)
    if not can_sort(experts, hidden_states) or (fits and are_few(len(hidden_states))):
        return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, hidden_states, top_k_index, top_k_weights)
    weights = _weights(experts)
    x_TD = hidden_states.to(weights.down_EDF.dtype)
    if torch.is_grad_enabled():
        y_TD = _SortedExperts.apply(x_TD, top_k_weights, top_k_index, _activation(experts), *weights)
    elif len(x_TD) == 1 and (picked := top_k_index.flatten().tolist()) and max(picked) < experts.num_experts:
        y_TD = _one_token(x_TD, top_k_weights, picked, _activation(experts), weights)
    else:
        assignments = sort_assignments(top_k_index, experts.num_experts)
        y_TD = _run(x_TD, top_k_weights, assignments, _activation(experts), weights)
    return y_TD.to(hidden_states.dtype)


def can_sort(experts: Any, hidden_states: torch.Tensor) -> bool:
    """Whether `sorted_mm` can run itself: the number of an expert's tokens must be known, which costs a GPU its queue
    and torch.compile its graph; and the backward pass makes activations again, so they may not learn or be random."""
    return (
        hidden_states.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not experts.has_post_expert_norm
        and not any(_learns_or_drops(part) for part in experts.modules() if part is not experts)
    )


def are_few(tokens: int) -> bool:
    """Whether sorting so many does not pay. (Autocast is of another dtype than the weights, which `grouped_mm` does
    not cast.)"""
    if torch.is_autocast_enabled("cpu"):
        return False
    if torch.is_grad_enabled():
        return tokens < FEW_TOKENS["training"]
    return 1 < tokens < FEW_TOKENS["forward"]


def grouped_mm_fits(experts: Any, dtype: torch.dtype) -> bool:
    """The kernel has no float64, and wants every row to start on a 16-byte boundary. (Widths are read off the
    tensors: under tensor parallelism a process has some of the neurons.)"""
    row_bytes = [width * dtype.itemsize for width in experts.down_proj.shape[1:]]
    return dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


def _learns_or_drops(module: nn.Module) -> bool:
    drops = isinstance(module, nn.Dropout) and module.training and module.p > 0
    return drops or next(module.parameters(recurse=False), None) is not None


class Weights(NamedTuple):
    """Of all experts, an output's row after the other; None for biases that there are not."""

    up_EAD: torch.Tensor
    up_bias_EA: torch.Tensor | None
    down_EDF: torch.Tensor
    down_bias_ED: torch.Tensor | None


def _weights(experts: Any) -> Weights:
    def projection(name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = getattr(experts, name)
        if torch.is_autocast_enabled("cpu"):
            weight = weight.to(torch.get_autocast_dtype("cpu"))
        bias = getattr(experts, f"{name}_bias").to(weight.dtype) if experts.has_bias else None
        return weight.transpose(-2, -1) if experts.is_transposed else weight, bias

    return Weights(*projection("gate_up_proj" if experts.has_gate else "up_proj"), *projection("down_proj"))


def _activation(experts: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """(R, A) -> (R, F)."""
    return experts._apply_gate if experts.has_gate else experts.act_fn


class Assignments(NamedTuple):
    """Args:
    order_S: places in the flattened (T, K) choices, in the order of their experts, those of no expert last.
    token_S: the tokens that they are of.
    bounds: E + 1 numbers; an expert's begin and end.
    """

    order_S: torch.Tensor
    token_S: torch.Tensor
    bounds: list[int]

    def by_expert(self) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Expert, its places (R,) and its tokens (R,), for each that has any."""
        parts = enumerate(pairwise(self.bounds))
        return [(e, self.order_S[start:end], self.token_S[start:end]) for e, (start, end) in parts if start < end]


def sort_assignments(index_TK: torch.Tensor, num_experts: int) -> Assignments:
    """Of `index` (T, K); E and above stands for no expert."""
    expert_S = index_TK.reshape(-1)
    order_S = expert_S.argsort(stable=True)
    counts = torch.bincount(expert_S, minlength=num_experts)[:num_experts]
    return Assignments(order_S, order_S // index_TK.shape[1], [0, *counts.cumsum(0).tolist()])


def _run(
    x_TD: torch.Tensor,
    gates_TK: torch.Tensor,
    assignments: Assignments,
    activation: Callable[[torch.Tensor], torch.Tensor],
    weights: Weights,
    kept: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """(T, D) in the wider dtype of experts and gates; what each activation reads is appended to `kept`."""
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, gates_TK.dtype))
    for expert, place_R, token_R in assignments.by_expert():
        a_RA = _linear(x_TD[token_R], weights.up_EAD, weights.up_bias_EA, expert)
        if kept is not None:
            kept.append(a_RA)
        y_RD = _linear(activation(a_RA), weights.down_EDF, weights.down_bias_ED, expert)
        y_TD.index_add_(0, token_R, y_RD * gates_TK.flatten()[place_R, None].to(y_TD.dtype))
    return y_TD


def _one_token(
    x_1D: torch.Tensor,
    gates_1K: torch.Tensor,
    picked: list[int],
    activation: Callable[[torch.Tensor], torch.Tensor],
    weights: Weights,
) -> torch.Tensor:
    """`_run` for one token, which needs no sorting."""
    a_KA = torch.cat([_linear(x_1D, weights.up_EAD, weights.up_bias_EA, expert) for expert in picked])
    rows = zip(activation(a_KA).split(1), picked, strict=True)
    y_KD = torch.cat([_linear(h_1F, weights.down_EDF, weights.down_bias_ED, expert) for h_1F, expert in rows])
    dtype = torch.promote_types(y_KD.dtype, gates_1K.dtype)
    return gates_1K.to(dtype) @ y_KD.to(dtype)


def _linear(x: torch.Tensor, weight_EOI: torch.Tensor, bias_EO: torch.Tensor | None, expert: int) -> torch.Tensor:
    return functional.linear(x, weight_EOI[expert], None if bias_EO is None else bias_EO[expert])


class _SortedExperts(torch.autograd.Function):
    """`_run`, which keeps for its backward pass no more than what the activations read."""

    @staticmethod
    def forward(ctx, x_TD, gates_TK, index_TK, activation, up_EAD, up_bias_EA, down_EDF, down_bias_ED):
        weights = Weights(up_EAD, up_bias_EA, down_EDF, down_bias_ED)
        ctx.assignments = sort_assignments(index_TK, len(down_EDF))
        ctx.activation = activation
        kept: list[torch.Tensor] = []
        y_TD = _run(x_TD, gates_TK, ctx.assignments, activation, weights, kept)
        ctx.save_for_backward(x_TD, gates_TK, *weights, *kept)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad_TD):
        x_TD, gates_TK, up_EAD, up_bias_EA, down_EDF, down_bias_ED, *kept = ctx.saved_tensors
        wants_x, wants_gates, _, _, wants_up, wants_up_bias, wants_down, wants_down_bias = ctx.needs_input_grad
        dtype = down_EDF.dtype
        wide = torch.promote_types(dtype, torch.float32)
        x_grad: Any = torch.zeros_like(x_TD, dtype=wide) if wants_x else None
        gates_grad_S: Any = gates_TK.new_zeros(gates_TK.numel()) if wants_gates else None
        by_expert = ctx.assignments.by_expert()
        make = torch.empty_like if len(by_expert) == len(down_EDF) else torch.zeros_like  # 0 for those without tokens
        up_grad: Any = make(up_EAD) if wants_up else None
        up_bias_grad: Any = make(up_bias_EA) if wants_up_bias else None
        down_grad: Any = make(down_EDF) if wants_down else None
        down_bias_grad: Any = make(down_bias_ED) if wants_down_bias else None

        for (expert, place_R, token_R), a_RA in zip(by_expert, kept, strict=True):
            a_RA = a_RA.detach().requires_grad_()
            with torch.enable_grad():
                h_RF = ctx.activation(a_RA)
            gate_R1 = gates_TK.flatten()[place_R, None]
            y_grad_RD = y_grad_TD[token_R]
            scaled_RD = (y_grad_RD * gate_R1).to(dtype)
            if wants_down:
                torch.mm(scaled_RD.t(), h_RF.detach(), out=down_grad[expert])
            if wants_down_bias:
                torch.sum(scaled_RD, 0, out=down_bias_grad[expert])
            h_grad_RF = y_grad_RD.to(dtype) @ down_EDF[expert]  # yet without the gate, whose own gradient this gives
            if wants_gates:
                of_gate_R = (h_grad_RF * h_RF.detach()).sum(1, dtype=gates_TK.dtype)
                if down_bias_ED is not None:
                    of_gate_R += (y_grad_RD @ down_bias_ED[expert].to(y_grad_RD.dtype)).to(gates_TK.dtype)
                gates_grad_S[place_R] = of_gate_R
            if not (wants_x or wants_up or wants_up_bias):
                continue
            [a_grad_RA] = torch.autograd.grad(h_RF, a_RA, h_grad_RF.mul_(gate_R1))
            if wants_up:
                torch.mm(a_grad_RA.t(), x_TD[token_R], out=up_grad[expert])
            if wants_up_bias:
                torch.sum(a_grad_RA, 0, out=up_bias_grad[expert])
            if wants_x:
                x_grad.index_add_(0, token_R, (a_grad_RA @ up_EAD[expert]).to(wide))

        gates_grad = gates_grad_S.view_as(gates_TK) if wants_gates else None
        x_grad = x_grad.to(dtype) if wants_x else None
        return x_grad, gates_grad, None, None, up_grad, up_bias_grad, down_grad, down_bias_grad


ExpertsInterface.register(SORTED_MM, sorted_mm_experts_forward)
