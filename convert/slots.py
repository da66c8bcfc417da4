"""Where each part of each expert lies: the unit in which experts are compared, taken out, and put in."""

from collections.abc import Iterator
from dataclasses import dataclass

from .headers import DTYPES, TensorInfo
from .mixture import Mixture, part

SHARED = "shared"
# What routers have of each expert, beside the form's own weight.
ROUTER_TENSORS = ("noise_weight", "e_score_correction_bias")


@dataclass(frozen=True)
class Slot:
    """Args:
    name: what it is called whatever the form on disk: `layers.3.experts.0.up.weight`.
    layer, expert: whose it is; the shared expert's index is `SHARED`.
    is_router: whether it is the router's row of the expert.
    info: where it lies; `info.name` is the tensor that holds it.
    start: at which of that tensor's values, counted in order, it begins.
    """

    name: str
    layer: int
    expert: int | str
    is_router: bool
    info: TensorInfo
    start: int

    @property
    def key(self) -> str:
        """LAYER.EXPERT."""
        return f"{self.layer}.{self.expert}"


def slots_of(mixture: Mixture) -> dict[str, Slot]:
    """Every part of every expert by its name. Each is one piece of one tensor.

    Of experts of low rank, only what each has for itself; the network that they share is no expert's.
    """
    made: dict[str, Slot] = {}
    for layer in mixture.layers:
        places = [*_experts(mixture, layer), *_routers(mixture, layer), *_shared(mixture, layer)]
        for expert, leaf, info, is_router in places:
            name = f"layers.{layer}.experts.{expert}.{leaf}"
            held = mixture.checkpoint.tensors[info.name]
            start = (info.start - held.start) // DTYPES[info.dtype].itemsize
            made[name] = Slot(name, layer, expert, is_router, info, start)
    return made


Place = tuple[int | str, str, TensorInfo, bool]


def _experts(mixture: Mixture, layer: int) -> Iterator[Place]:
    for expert in range(mixture.num_experts):
        if mixture.rank:
            for name in mixture.factors(layer):
                info = mixture.checkpoint.tensors[name]
                leaf = name.rpartition(".")[2]
                yield expert, leaf, part(info, expert, mixture.num_experts, info.shape[1:]), False
            continue
        for role in mixture.roles:
            for kind in mixture.kinds:
                yield expert, f"{role}.{kind}", mixture.place(layer, role, kind, expert), False


def _routers(mixture: Mixture, layer: int) -> Iterator[Place]:
    weight = mixture.name(layer, mixture.form.router)
    names = [weight, *(f"{weight.removesuffix('weight')}{name}" for name in ROUTER_TENSORS)]
    for name in names:
        info = mixture.checkpoint.tensors.get(name)
        if info is not None and info.shape[0] == mixture.num_experts:
            for expert in range(mixture.num_experts):
                leaf = f"router.{name.rpartition('.')[2]}"
                yield expert, leaf, part(info, expert, mixture.num_experts, info.shape[1:]), True


def _shared(mixture: Mixture, layer: int) -> Iterator[Place]:
    form, tensors = mixture.form, mixture.checkpoint.tensors
    names = {f"{role}.{kind}": f"{name}.{kind}" for role, name in form.shared.items() for kind in ("weight", "bias")}
    if form.shared_gate:
        names["shared_gate.weight"] = form.shared_gate
    for leaf, name in names.items():
        info = tensors.get(mixture.name(layer, name))
        if info is not None:
            yield SHARED, leaf, info, False
