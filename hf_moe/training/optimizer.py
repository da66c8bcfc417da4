"""Groups of parameters that an optimizer treats in different ways."""

from torch import nn
from torch.optim import Optimizer

from .freezing import kind_of

ROUTERS = "routers"  # marks their groups


def without_decay(model: nn.Module, names: list[str]) -> list[str]:
    """Of the `names` that Trainer lets decay (no biases, no norms), those of more than one dimension: whatever a norm
    is called, its weights are a vector. (A router's selection bias is no parameter.)"""
    shapes = {name: parameter.ndim for name, parameter in model.named_parameters()}
    return [name for name in names if shapes.get(name, 2) > 1]


def give_routers_a_rate(optimizer: Optimizer, model: nn.Module, learning_rate: float) -> None:
    """Moves the routers' parameters into groups of their own, which differ by their `lr` alone. Before the first step,
    and before the scheduler is made: it scales each group's rate.
    """
    routers = {id(parameter) for name, parameter in model.named_parameters() if kind_of(name) == "router"}
    for group in list(optimizer.param_groups):
        moved = [parameter for parameter in group["params"] if id(parameter) in routers]
        if moved:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in routers]
            optimizer.add_param_group({**group, "params": moved, "lr": learning_rate, ROUTERS: True})
