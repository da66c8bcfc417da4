"""A mixture with fewer experts: each of them is one of the old ones, or an average of some, read expert by expert."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .align import Rows, by_neuron, find_order
from .experts import scaled, take_neurons
from .headers import DTYPES
from .mixture import Mixture
from .plan import TensorPlan

# Of one new expert: the old ones and their weights, which sum to 1. The first keeps the order of its neurons.
Group = tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Blend:
    """Args:
    mixture: where the old experts are read from.
    groups: layer -> of each new expert, what it is made of.
    scales: layer -> what the new experts' output is multiplied by, where it is not 1.
    """

    mixture: Mixture
    groups: dict[int, tuple[Group, ...]]
    scales: dict[int, float] = field(default_factory=dict)
    orders: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict, repr=False)

    def projection(self, layer: int, role: str, kind: str, expert: int) -> torch.Tensor:
        """A new expert's; (out, in) or (out,). Experts that are equal have exactly themselves as their average."""
        group = self.groups[layer][expert]
        made = average((self._old(layer, role, kind, group, old), weight) for old, weight in group)
        return scaled(made, self.scales.get(layer, 1.0)) if role == "down" else made

    def router(self, layer: int) -> torch.Tensor:
        """(new experts, in): of each group the row of its heaviest expert, or their average where several are. (The
        average of all is short where they point elsewhere, and moves the model more: benchmarks/reductions.py.)"""
        rows = self.mixture.router(layer)
        heaviest = [[old for old, weight in group if weight == group[0][1]] for group in self.groups[layer]]
        return torch.stack([average((rows[old], 1 / len(olds)) for old in olds) for olds in heaviest])

    @property
    def num_experts(self) -> int:
        return len(next(iter(self.groups.values())))

    def _old(self, layer: int, role: str, kind: str, group: Group, old: int) -> torch.Tensor:
        return take_neurons(self.mixture.projection(layer, role, kind, old), role, self._order(layer, group, old))

    def _order(self, layer: int, group: Group, old: int) -> torch.Tensor | None:
        if old == group[0][0]:
            return None
        if (layer, old) not in self.orders:
            self.orders[layer, old] = order_between(self.mixture, layer, group[0][0], old)
        return self.orders[layer, old]

    def decisions(self) -> dict[str, Any]:
        """All that decides the values besides the source, for JSON."""
        groups = {str(layer): [[list(old) for old in group] for group in held] for layer, held in self.groups.items()}
        return {"groups": groups, "scales": {str(layer): scale for layer, scale in self.scales.items()}}


def weighted(experts: list[int], weights: torch.Tensor) -> Group:
    """The group of these experts, of the weights they have among all."""
    total = float(weights[experts].sum())
    return tuple((expert, float(weights[expert]) / total) for expert in experts)


def average(values: Iterable[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """Weighted, rounded once; computed as the first and what the others are away from it."""
    rest = iter(values)
    first, _ = next(rest)
    total = None
    for value, weight in rest:
        wide = torch.promote_types(first.dtype, torch.float32)
        step = (value.to(wide) - first.to(wide)) * weight
        total = step if total is None else total.add_(step)
    return first if total is None else (first.to(total.dtype) + total).to(first.dtype)


def order_between(mixture: Mixture, layer: int, reference: int, other: int) -> torch.Tensor | None:
    """`find_order` for two experts."""
    return find_order(rows_of(mixture, layer, reference), rows_of(mixture, layer, other), neuron_tensors(mixture))


def rows_of(mixture: Mixture, layer: int, expert: int) -> Rows:
    return lambda role, kind: by_neuron(mixture.projection(layer, role, kind, expert), role)


def neuron_tensors(mixture: Mixture) -> list[tuple[str, str]]:
    """Role and kind of an expert's tensors that have a row a neuron."""
    return [(role, kind) for kind in mixture.kinds for role in mixture.roles if (role, kind) != ("down", "bias")]


def plan_tensors(blend: Blend) -> list[TensorPlan]:
    """Every tensor of the checkpoint, experts and routers with as many experts as are left."""
    mixture = blend.mixture
    made = {plan.name: plan for layer in mixture.layers for plan in _of_layer(mixture, layer, blend.num_experts)}
    old = {plan.name for layer in mixture.layers for plan in _of_layer(mixture, layer, mixture.num_experts)}
    tensors = []
    factors = {name for layer in mixture.layers for name in mixture.factors(layer)}  # in the experts, which are whole
    for name, info in mixture.checkpoint.tensors.items():
        if name in made:
            tensors.append(made[name])
        elif name not in old | factors:
            tensors.append(copied(name, info.dtype, info.shape))
    return tensors


def copied(name: str, dtype: str, shape: tuple[int, ...]) -> TensorPlan:
    return TensorPlan(name=name, dtype=dtype, shape=shape, method="copy", sources=(name,))


def _of_layer(mixture: Mixture, layer: int, number: int) -> Iterator[TensorPlan]:
    """Router and experts of a layer with the first `number` experts; names and shapes are those the source has."""
    form, prefix = mixture.form, mixture.prefix(layer)

    def plan(name: str, kind: str, method: str, roles: tuple[str, ...], experts: tuple[int, ...], stacked: bool):
        name = f"{prefix}.{name.format(block=mixture.block, expert=experts[0])}"
        info = mixture.checkpoint.tensors[name]
        shape = (number, *info.shape[1:]) if stacked else info.shape
        return TensorPlan(
            name=name,
            dtype=info.dtype,
            shape=shape,
            method=method,
            sources=(name,),
            layer=layer,
            kind=kind,
            roles=roles,
            experts=experts,
        )

    everyone = tuple(range(number))
    for kind in mixture.kinds:
        for experts in [everyone] if form.stacked else [(expert,) for expert in everyone]:
            for name, roles in form.experts.items():
                yield plan(name + form.endings[kind], kind, "experts", roles, experts, form.stacked)
    yield plan(form.router, "weight", "router", (), everyone, True)


def pieces(tensor: TensorPlan, blend: Blend) -> Iterator[torch.Tensor]:
    """The values of `tensor`, in order."""
    dtype = DTYPES[tensor.dtype]
    if tensor.method == "copy":
        yield from blend.mixture.checkpoint.read_pieces(tensor.name)
    elif tensor.method == "router":
        yield blend.router(tensor.layer).to(dtype)
    else:
        for expert in tensor.experts:
            for role in tensor.roles:
                yield blend.projection(tensor.layer, role, tensor.kind, expert).to(dtype)
