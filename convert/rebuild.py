"""A dense network out of a mixture's experts: parts are put together, a shared expert joins, scales are undone."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch

from hf_moe.errors import UsageError
from hf_moe.recipe import UpcycleRecipe

from .align import Rows, by_neuron, find_order
from .blend import Blend, Group, average, neuron_tensors, weighted
from .experts import scaled, take_neurons
from .headers import DTYPES, FLOATS
from .mixture import Mixture
from .partition import deal
from .reduce import Job, copy_size, recorded_recipe
from .scheme import NOT_PRESERVING, Exactness, Scheme, scheme_of
from .stream import seeded


@dataclass(frozen=True, kw_only=True)
class Rebuild:
    """How a mixture becomes one network a layer.

    Args:
        blend: of each part of a network, the experts that stand for it.
        recipe, scheme: by which the mixture was made, as far as is known.
        by: how experts that differ become one, or "copies".
        routed: layer -> what W2 of the parts is multiplied by.
        routed_bias: layer -> what b2 is multiplied by.
        shared: layer -> what the shared expert's output is multiplied by.
        exactness: whether the network is the mixture's function.
    """

    blend: Blend
    recipe: UpcycleRecipe
    scheme: Scheme
    by: str
    routed: dict[int, float]
    routed_bias: dict[int, float]
    shared: dict[int, float]
    exactness: Exactness = field(default_factory=Exactness)
    orders: dict[int, torch.Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def width(self) -> int:
        """Neurons of the network."""
        return self.scheme.parts * self.scheme.expert_width + (0 if self.scheme.shared_is_copy else self._set_aside)

    @property
    def _set_aside(self) -> int:
        return self.recipe.shared_expert_intermediate_size

    def projection(self, layer: int, role: str, kind: str) -> torch.Tensor:
        """(out, in) or (out,), its neurons in the order of the network it was made of, where that is known."""
        made = self._routed(layer, role, kind)
        if self.blend.mixture.shared_width:
            made = self._with_shared(made, layer, role, kind)
        return take_neurons(made, role, self._first_order(layer))

    def _routed(self, layer: int, role: str, kind: str) -> torch.Tensor:
        parts = [self.blend.projection(layer, role, kind, part) for part in range(self.scheme.parts)]
        if role != "down":
            return torch.cat(parts)
        if kind == "bias":
            return scaled(average((part, 1 / len(parts)) for part in parts), self.routed_bias[layer])
        return scaled(torch.cat(parts, dim=1), self.routed[layer])

    def _with_shared(self, routed: torch.Tensor, layer: int, role: str, kind: str) -> torch.Tensor:
        shared = self.blend.mixture.shared(layer, role, kind)
        if role == "down":
            shared = scaled(shared, self.shared[layer])
            if kind == "bias":
                return added(routed, shared)
            if not self.scheme.shared_is_copy:
                return torch.cat([routed, shared], dim=1)
            return added(routed, take_neurons(shared, role, self.shared_order(layer)))
        if not self.scheme.shared_is_copy:
            return torch.cat([routed, shared])
        weight = float(self.recipe.shared_expert_weight or 0)
        return average([(take_neurons(shared, role, self.shared_order(layer)), weight), (routed, 1 - weight)])

    def shared_order(self, layer: int) -> torch.Tensor | None:
        """Which neuron of a shared copy stands for each of the parts'."""
        if layer not in self.orders:
            self.orders[layer] = find_order(self._parts_rows(layer), self._shared_rows(layer), self._incoming())
        return self.orders[layer]

    def shared_is_equal(self, layer: int) -> bool:
        """Whether the shared copy's neurons are the parts', but for their outgoing weights."""
        return all(
            torch.equal(
                self._routed(layer, role, kind),
                take_neurons(self.blend.mixture.shared(layer, role, kind), role, self.shared_order(layer)),
            )
            for role, kind in self._incoming()
        )

    def _incoming(self) -> list[tuple[str, str]]:
        return [(role, kind) for role, kind in neuron_tensors(self.blend.mixture) if role != "down"]

    def _parts_rows(self, layer: int) -> Rows:
        return lambda role, kind: by_neuron(self._routed(layer, role, kind), role)

    def _shared_rows(self, layer: int) -> Rows:
        return lambda role, kind: by_neuron(self.blend.mixture.shared(layer, role, kind), role)

    def _first_order(self, layer: int) -> torch.Tensor | None:
        """Neurons dealt at random are put back where the recipe's seed took them from."""
        dealt = self.scheme.parts > 1 or self._set_aside
        if not dealt or self.recipe.partition != "random":
            return None
        parts_PF, shared_F = deal(
            self.width, self.scheme.parts, self._set_aside, None, seeded(self.recipe.seed, "neurons", layer)
        )
        return torch.cat([parts_PF.flatten(), shared_F]).argsort()


def added(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Their sum, rounded once; adding nothing changes nothing (not even the sign of a zero)."""
    if not one.any():
        return other
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) + other.to(wide)).to(one.dtype)


def plan_rebuild(job: Job, by: str) -> Rebuild:
    """How `job`'s mixture becomes dense.

    Raises:
        UsageError: where that depends on what only a text can tell.
        SourceError: where the recorded recipe is none.
    """
    mixture = job.mixture
    recipe = _recipe(mixture)
    parts = mixture.num_experts if recipe.method == "split" else recipe.granularity
    width = parts * mixture.width + recipe.shared_expert_intermediate_size
    scheme = scheme_of(recipe, width, gated="gate" in mixture.roles, dtype=_dtype(mixture))
    copies = _are_copies(mixture, parts)
    by = "copies" if copies else by.replace("auto", "usage" if job.text is not None else "average")
    together = parts if recipe.method == "copy" else mixture.top_k
    gates = {layer: _gate_sum(job, copies, layer) for layer in mixture.layers}
    rebuild = Rebuild(
        blend=Blend(mixture, {layer: _groups(job, by, parts, layer) for layer in mixture.layers}),
        recipe=recipe,
        scheme=scheme,
        by=by,
        routed={layer: gate / together for layer, gate in gates.items()},
        routed_bias=gates,
        shared={layer: _shared_factor(job, layer) for layer in mixture.layers},
    )
    reasons = tuple(_why_not_exact(rebuild, copies))
    return replace(rebuild, exactness=Exactness(NOT_PRESERVING, reasons) if reasons else scheme.exactness)


def _recipe(mixture: Mixture) -> UpcycleRecipe:
    """The one recorded, without what only changed values; where there is none, experts count as whole networks."""
    recipe = recorded_recipe(mixture) or UpcycleRecipe(
        base_model="",
        num_experts=mixture.num_experts,
        num_experts_per_tok=mixture.top_k,
        norm_topk_prob=mixture.norm_topk_prob,
    )
    set_aside = mixture.shared_width if recipe.shared_expert_weight is None else 0
    return replace(recipe, shared_expert_intermediate_size=set_aside, noise_std=0.0, drop_ratio=0.0, expert_rank=0)


def _dtype(mixture: Mixture) -> str:
    held = {mixture.checkpoint.tensors[name].dtype for name in mixture.names(mixture.layers[0])}
    return str(DTYPES[next(dtype for dtype in FLOATS if dtype in held)]).removeprefix("torch.")


def _are_copies(mixture: Mixture, parts: int) -> bool:
    """Whether every expert equals the first that holds the same part."""
    return all(
        torch.equal(first, mixture.projection(layer, role, kind, expert))
        for layer in mixture.layers
        for kind in mixture.kinds
        for role in mixture.roles
        for part in range(parts)
        for first in [mixture.projection(layer, role, kind, part)]
        for expert in range(part + parts, mixture.num_experts, parts)
    )


def _groups(job: Job, by: str, parts: int, layer: int) -> tuple[Group, ...]:
    """Of each part, the experts that stand for it, the most used copy first."""
    if by == "copies":
        return tuple(((part, 1.0),) for part in range(parts))
    weights = torch.ones(job.mixture.num_experts) if by == "average" else job.weights(layer)
    copies = weights.view(-1, parts).sum(1).argsort(descending=True, stable=True).tolist()
    if by == "best":
        copies = copies[:1]
    return tuple(weighted([copy * parts + part for copy in copies], weights) for part in range(parts))


def _gate_sum(job: Job, copies: bool, layer: int) -> float:
    """What a token's gates sum to: of copies, at the start."""
    mixture = job.mixture
    if mixture.norm_topk_prob:
        return 1.0
    if copies:
        return mixture.top_k / mixture.num_experts
    if job.text is None:
        raise UsageError(
            f"{mixture.checkpoint.path}: its gates are not renormalised, so what they sum to must be measured: "
            "give a text."
        )
    return job.usage.gates[layer]


def _shared_factor(job: Job, layer: int) -> float:
    gate = job.mixture.shared_gate(layer)
    if gate is None:
        return 1.0
    if not gate.any():
        return 0.5
    if job.text is None:
        raise UsageError(
            f"{job.checkpoint.path}: its shared expert has a gate, whose values must be measured: give a text."
        )
    return job.usage.shared_gates[layer]


def _why_not_exact(rebuild: Rebuild, copies: bool) -> Iterable[str]:
    mixture, scheme = rebuild.blend.mixture, rebuild.scheme
    if not copies:
        yield "its experts differ"
        return
    if rebuild.recipe.granularity > 1 and copy_size(mixture) != rebuild.recipe.granularity:
        yield "its router no longer takes the parts of a copy as a whole"
    gates = [mixture.shared_gate(layer) for layer in mixture.layers]
    if any(gate is not None and gate.any() for gate in gates):
        yield "its shared expert counts more for some tokens than for others"
    if scheme.shared_is_copy and not all(rebuild.shared_is_equal(layer) for layer in mixture.layers):
        yield "its shared expert differs from the others"
