"""Where numbers first stop being finite."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hf_moe.routing.hooks import removing

from .freezing import layer_of


@torch.no_grad()
def first_bad_output(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """The first module with weights, in the order of computing, whose output holds NaN or Inf, in words; None where
    all are finite.

    The batch is run once more, without dropout, so what random numbers alone did is not found again.
    """
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all_finite(_tensors(output)):
                found.append(name)

        return hook

    modules = [
        (name, module) for name, module in model.named_modules() if next(module.parameters(False), None) is not None
    ]
    training = model.training
    model.eval()
    try:
        with removing([module.register_forward_hook(look(name)) for name, module in modules]):
            model(**{name: value for name, value in inputs.items() if name != "labels"})
    except (FloatingPointError, RuntimeError, ValueError):
        pass  # what was found until then is what is asked for
    finally:
        model.train(training)
    return place(found[0]) if found else None


def first_bad_tensor(named: Iterable[tuple[str, torch.Tensor | None]]) -> str | None:
    """The first of `named` that holds NaN or Inf, in words."""
    return next((place(name) for name, value in named if value is not None and not all_finite([value])), None)


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors if tensor.is_floating_point())


def place(name: str) -> str:
    layer = layer_of(name)
    return name if layer is None else f"{name} (layer {layer})"


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in _tensors(part)] if isinstance(output, list | tuple) else []
