"""How each planned tensor is made, piece by piece, so that no more than one dense matrix is in memory at a time."""

import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache

import torch

from hf_moe.errors import SourceError, UsageError

from .experts import dropped_neurons, scaled, take_neurons, with_new_neurons, with_noise
from .headers import DTYPES
from .network import is_finite
from .partition import deal
from .plan import Plan, TensorPlan
from .routers import calibrated_normal, for_distances, tied
from .scheme import router_logit_std

PIECE_VALUES = 8 * 2**20


def pieces(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    """The values of `tensor`, in order, in pieces of any shape.

    Raises:
        SourceError: where a source tensor holds NaN or Inf, or its file changed meanwhile.
        UsageError: where noise leads out of the numbers that the dtype holds.
    """
    return METHODS[tensor.method](tensor, plan)


def _copied(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    [name] = tensor.sources
    yield from plan.source.pieces(name, PIECE_VALUES)


def _experts(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    """One expert's share of one matrix at a time. A value depends on the recipe, the layer, the role and the expert,
    never on which tensors stand beside it: so it is the same in every form and order of writing."""
    scheme, recipe = plan.schemes[tensor.layer], plan.recipe
    read = lru_cache(maxsize=2)(lambda role, giver: _projection(tensor, plan.giver(giver), role))
    parts_PF, _ = _neurons(tensor, plan)
    changed = recipe.noise_std > 0 or recipe.drop_ratio > 0

    @lru_cache(maxsize=2 if scheme.parts == 1 else 0)
    def share(role: str, part: int, giver: int) -> torch.Tensor:
        weight = take_neurons(read(role, giver), role, None if parts_PF is None else parts_PF[part])
        scale = _down_scale(tensor, scheme.down_scale, scheme.bias_scale) if role == "down" else 1.0
        return scaled(weight, scale).contiguous()

    for expert in tensor.experts:
        for role in tensor.roles:
            weight = share(role, expert % scheme.parts, expert if plan.donors else 0)
            yield (_changed(weight, tensor, plan, role, expert) if changed else weight).to(DTYPES[tensor.dtype])


def _changed(weight: torch.Tensor, tensor: TensorPlan, plan: Plan, role: str, expert: int) -> torch.Tensor:
    recipe, width = plan.recipe, plan.schemes[tensor.layer].expert_width
    of_expert, of_share = (tensor.layer, expert), (tensor.layer, expert, role, tensor.kind)
    dropped = dropped_neurons(width, recipe.drop_ratio, _generator(plan, "drop", *of_expert))
    made = with_new_neurons(weight, role, dropped, _generator(plan, "new", *of_share))
    made = with_noise(made, recipe.noise_std, _generator(plan, "noise", *of_share))
    if not is_finite(made) and is_finite(weight):
        raise UsageError(f"noise_std {recipe.noise_std}: leads out of the numbers that {tensor.dtype} holds.")
    return made


def _shared(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    scheme, [role] = plan.schemes[tensor.layer], tensor.roles
    _, shared_F = _neurons(tensor, plan)
    giver = plan.shared_donor or plan
    weight = take_neurons(_projection(tensor, giver, role), role, None if scheme.shared_is_copy else shared_F)
    scale = _down_scale(tensor, scheme.shared_down_scale, scheme.shared_bias_scale) if role == "down" else 1.0
    yield scaled(weight, scale).to(DTYPES[tensor.dtype])


def _average(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    """The mean over the donors, taken in float64."""
    [name] = tensor.sources
    for parts in zip(*(donor.source.pieces(name, PIECE_VALUES // 8) for donor in plan.donors), strict=True):
        total = parts[0].to(torch.float64)
        for part in parts[1:]:
            total = total + part
        yield (total / len(parts)).to(DTYPES[tensor.dtype])


def _router(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    if tensor.layer in plan.routers:
        yield plan.routers[tensor.layer].to(DTYPES[tensor.dtype])
        return
    norm = [plan.source.read(source) for source in tensor.sources]
    group = plan.recipe.granularity
    weight = norm[0].float() + plan.family.norm_offset if norm else torch.ones(tensor.shape[1])
    bias = norm[1] if len(norm) > 1 else None
    rows = calibrated_normal(
        tensor.shape[0] // group,
        weight,
        bias,
        router_logit_std(plan.recipe),
        _generator(plan, "router", tensor.layer),
    )
    if plan.recipe.router_type == "laplace":
        rows = for_distances(rows, weight, bias)
    yield tied(rows, group).to(DTYPES[tensor.dtype])


def _drawn(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    """Normal, so that a normal input of unit size stays one; of one expert at a time."""
    experts, *shape = tensor.shape
    for expert in range(experts):
        generator = _generator(plan, "drawn", tensor.layer, tensor.name.rpartition(".")[2], expert)
        yield (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(DTYPES[tensor.dtype])


def _zeros(tensor: TensorPlan, plan: Plan) -> Iterator[torch.Tensor]:
    yield torch.zeros(tensor.shape, dtype=DTYPES[tensor.dtype])


METHODS: dict[str, Callable[[TensorPlan, Plan], Iterator[torch.Tensor]]] = {
    "copy": _copied,
    "average": _average,
    "experts": _experts,
    "shared": _shared,
    "router": _router,
    "drawn": _drawn,
    "zeros": _zeros,
}


def _projection(tensor: TensorPlan, plan: Plan, role: str) -> torch.Tensor:
    return plan.networks[tensor.layer].projections(tensor.kind)[role].read(plan.source)


def _down_scale(tensor: TensorPlan, weight: float, bias: float) -> float:
    return weight if tensor.kind == "weight" else bias


def _neurons(tensor: TensorPlan, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The parts (P, F / P) that the layer's neurons are dealt into, and the shared ones; None where all go to all."""
    if tensor.layer not in plan.deals:
        plan.deals[tensor.layer] = _deal(tensor, plan)
    return plan.deals[tensor.layer]


def _deal(tensor: TensorPlan, plan: Plan) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    scheme, network = plan.schemes[tensor.layer], plan.networks[tensor.layer]
    if scheme.parts == 1 and (scheme.shared_is_copy or not scheme.shared_width):
        return None, None
    role = "gate" if "gate" in network.weight else "up"
    features = None
    if plan.recipe.partition == "kmeans":
        features = network.weight[role].read(plan.source)
    elif plan.recipe.partition == "coactivation":
        if tensor.layer not in plan.features:
            raise SourceError("the neurons were dealt by what they do on a text, which is not here.")
        features = plan.features[tensor.layer]
    shared = 0 if scheme.shared_is_copy else scheme.shared_width
    width = network.weight[role].shape(plan.source)[0]
    return deal(width, scheme.parts, shared, features, _generator(plan, "neurons", tensor.layer))


def _generator(plan: Plan, *what: object) -> torch.Generator:
    return seeded(plan.recipe.seed, *what)


def seeded(seed: int, *what: object) -> torch.Generator:
    """Seeded by the recipe and by what is drawn, so that nothing depends on the order of writing.

    (Through a checksum: PyTorch's CPU generator looks at 32 bits of a seed only.)
    """
    text = "/".join(map(str, (seed, *what)))
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
