"""What passes between a head, its body and their routers in one forward pass."""

from collections.abc import Callable
from typing import Any

import torch

from .moe_routers import ForwardPass, TopKRouter


class RouterState:
    """What a body hands up to its head in one forward pass.

    An opaque object on purpose: containers among keyword arguments are copied by FSDP and Accelerate on the way.
    """

    router_logits: tuple[torch.Tensor, ...] = ()
    router_index: tuple[torch.Tensor, ...] = ()
    token_mask: torch.Tensor | None = None

    def find_mask(self, body: Any, attention_mask: torch.Tensor | None) -> None:
        """There are no logits where LayerDrop skipped every mixture."""
        if self.router_logits:
            self.token_mask = body.token_mask(attention_mask, self.router_logits[0].shape[0])


def hand_down(body: Any, attention_mask: torch.Tensor | None) -> list[TopKRouter]:
    """Tells the routers of `body` which tokens are padding, where their kind has to know it: "expert_choice" always,
    "sigmoid" to count what its selection bias is moved by. Returns those told; `take_back` when the pass is over."""
    config = body.config
    counts = body.training and config.router_type == "sigmoid" and config.router_bias_update_rate > 0
    if config.router_type != "expert_choice" and not counts:
        return []

    def token_mask(num_tokens: int) -> torch.Tensor | None:
        return body.token_mask(attention_mask, num_tokens)

    return _tell(_routers(body), ForwardPass(token_mask, counts))


def take_back(routers: list[TopKRouter]) -> None:
    _tell(routers, None)


def checkpointed(model: Any, checkpoint: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
    """`checkpoint(function, …)`, by which routers are told the same when `function` runs again in the backward pass,
    but count nothing twice."""
    routers = [router for router in _routers(model) if router.forward_pass is not None]
    if not routers:
        return checkpoint(function, *args, **kwargs)
    told: Any = routers[0].forward_pass

    def run(*inputs: Any, **options: Any) -> Any:
        if routers[0].forward_pass is told:
            return function(*inputs, **options)
        _tell(routers, told._replace(counts=False))
        try:
            return function(*inputs, **options)
        finally:
            take_back(routers)

    return checkpoint(run, *args, **kwargs)


def _routers(model: Any) -> list[TopKRouter]:
    return [module for module in model.modules() if isinstance(module, TopKRouter)]


def _tell(routers: list[TopKRouter], forward_pass: ForwardPass | None) -> list[TopKRouter]:
    for router in routers:
        router.forward_pass = forward_pass
    return routers
