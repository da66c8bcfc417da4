"""Balance without a loss: a bias on the scores that experts are chosen by.

Letters in names: L mixture layers, E experts.
"""

import torch
from torch import distributed

from .moe_routers import TopKRouter


@torch.no_grad()
def move_selection_bias(routers: list[TopKRouter], rate: float) -> None:
    """Adds `rate` · sign(mean load - load) to every router's bias (Wang et al. 2024, arXiv 2408.15664, algorithm 1).

    Loads are the assignments counted since the last call, in all processes together; then they are forgotten. A layer
    that counted none stays as it is, and takes part all the same: every process must bring as many.
    """
    device = routers[0].weight.device
    load_LE = torch.stack([_load(router).to(device) for router in routers])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(load_LE)
    number_L1 = load_LE.new_tensor([[router.num_enabled] for router in routers])
    missing_LE = load_LE.sum(dim=1, keepdim=True) - load_LE * number_L1  # in integers, so that equal is equal
    for router, missing_E in zip(routers, missing_LE, strict=True):
        router.e_score_correction_bias += rate * missing_E.sign().to(router.e_score_correction_bias)
        router.load_E = None


def _load(router: TopKRouter) -> torch.Tensor:
    """(E,), int64."""
    if router.load_E is not None:
        return router.load_E
    return torch.zeros_like(router.e_score_correction_bias, dtype=torch.long)
