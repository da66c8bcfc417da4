"""Which experts a token is sent to.

Letters in names: B batch, S sequence, T tokens (B·S flattened), D hidden, E experts, K chosen, F expert width.
"""

import torch
from torch import nn
from torch.nn import functional
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
