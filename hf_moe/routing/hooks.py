"""Hooks on the experts of a model: where our mixtures and Transformers' own meet.

Whatever the router, the experts are called with (hidden_states (T, D), top_k_index (T, K), top_k_weights (T, K)); an
empty slot has the index E, one past the last expert.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling.modeling_moe import MoePreTrainedModelMixin

ROUTERS = ("gate", "router")  # what the experts' neighbour is called

# (layer, experts, x_TD, index_TK, gates_TK, kept_T): `kept_T` is False for padding, None where nothing is padded.
See = Callable[[int, nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None]


def experts_of(model: nn.Module) -> dict[int, str]:
    """Layer -> name of its experts' module, in order.

    Raises:
        UsageError: where there are none, so the model is dense.
    """
    names = [name for name, _ in model.named_modules() if name.rpartition(".")[2] == "experts"]
    found = {int([part for part in name.split(".") if part.isdigit()][-1]): name for name in names}
    if not found:
        raise UsageError(f"{type(model).__name__}: has no experts; routing is that of a mixture, and this is dense.")
    return found


def num_experts_of(experts: nn.Module) -> int:
    """How many experts a module holds, whatever it is wrapped in (PEFT)."""
    held: Iterator[Any] = (getattr(module, "num_experts", None) for module in experts.modules())
    return next(count for count in held if count is not None)


def attach(model: nn.Module, see: See) -> list[RemovableHandle]:
    """Calls `see` wherever tokens meet experts in a forward of `model`.

    What is computed outside a forward of `model` is left out: gradient checkpointing computes layers again in the
    backward pass, and these tokens were seen already.

    Args:
        model: what is called, with its `attention_mask` by name or position; a wrapper (PEFT, DDP) will do.

    Returns:
        the hooks; call `remove` on each.
    """
    inside: dict[str, Any] = {}

    @torch.compiler.disable
    def enter(module, args, kwargs):
        inside["mask"] = _attention_mask(module, args, kwargs)

    @torch.compiler.disable
    def leave(module, args, output):
        inside.clear()

    handles = [
        model.register_forward_pre_hook(enter, with_kwargs=True),
        model.register_forward_hook(leave, always_call=True),
    ]
    for layer, name in experts_of(model).items():

        @torch.compiler.disable
        def before_experts(module, args, layer=layer):
            if inside:
                x_TD, index_TK, gates_TK = args
                with torch.no_grad():
                    see(layer, module, x_TD, index_TK, gates_TK, _kept(model, inside["mask"], len(index_TK)))

        handles.append(model.get_submodule(name).register_forward_pre_hook(before_experts))
    return handles


def _attention_mask(model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor | None:
    if "attention_mask" in kwargs or not args:
        return kwargs.get("attention_mask")
    return inspect.signature(model.forward).bind_partial(*args).arguments.get("attention_mask")


def _kept(model: nn.Module, attention_mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """(T,), which tokens are real: by the model's own rule if it has one (of sound the mask is over samples)."""
    rule: Any = getattr(model, "token_mask", None)
    if rule is None:
        return MoePreTrainedModelMixin.token_mask(model, attention_mask, tokens)  # type: ignore[arg-type]
    return rule(attention_mask, tokens)


@contextmanager
def removing(handles: list[RemovableHandle]) -> Iterator[None]:
    """Hooks that last as long as the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(model: nn.Module, see: See) -> Iterator[None]:
    """`attach` for a while."""
    with removing(attach(model, see)):
        yield


@contextmanager
def refusing_nan(model: nn.Module) -> Iterator[None]:
    """Within it a router whose logits are not numbers is an error: the choice it makes of them means nothing.

    Raises:
        SourceError: naming the layer, and whether its router or what comes before is to blame.
    """
    handles = []
    for layer, name in experts_of(model).items():
        block = model.get_submodule(name.rpartition(".")[0])
        router = next((getattr(block, word) for word in ROUTERS if hasattr(block, word)), None)
        if router is not None:

            def after_router(module, args, output, layer=layer):
                logits = output[0] if isinstance(output, tuple) else output
                if bool(torch.isnan(logits).any()):
                    came_in = bool(torch.isnan(args[0]).any())
                    why = "what comes in is NaN already" if came_in else "its own weights make them so"
                    raise SourceError(f"layer {layer}: the router's logits are NaN: {why}.")

            handles.append(router.register_forward_hook(after_router))
    with removing(handles):
        yield
