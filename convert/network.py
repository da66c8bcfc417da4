"""A checkpoint whose tensors go by the dense class's names, and the feed-forward networks in it."""

from dataclasses import dataclass

import torch

from hf_moe.errors import SourceError

from .checkpoint import Checkpoint
from .families import Family
from .headers import DTYPES, FLOATS

KINDS = ("weight", "bias")


@dataclass(frozen=True)
class Source:
    """Args:
    checkpoint: where the tensors lie.
    names: the dense class's name of each tensor -> the checkpoint's.
    dtype: what floating-point tensors are read as (safetensors' word); None: as they are.
    allow_nonfinite: whether NaN and infinity are let through.
    """

    checkpoint: Checkpoint
    names: dict[str, str]
    dtype: str | None = None
    allow_nonfinite: bool = False

    def dtype_of(self, name: str) -> str:
        stored = self.checkpoint.tensors[self.names[name]].dtype
        return self.dtype if self.dtype is not None and stored in FLOATS else stored

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[self.names[name]].shape

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; errors as in `checked`, and those of `Checkpoint.read`."""
        return self.checked(name, self.checkpoint.read(self.names[name]))

    def checked(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """`values` (all or some of tensor `name`) in the dtype wanted.

        Raises:
            SourceError: where they hold NaN or infinity, or leave the numbers that the dtype holds.
        """
        if not values.is_floating_point():
            return values
        cast = values.to(DTYPES[self.dtype_of(name)])
        if self.allow_nonfinite or is_finite(cast):
            return cast
        stored = self.checkpoint.tensors[self.names[name]]
        if is_finite(values):
            raise SourceError(
                f"{stored.file}: tensor {stored.name!r} holds numbers that {self.dtype_of(name)} can't; "
                "choose bfloat16 or float32."
            )
        raise SourceError(
            f"{stored.file}: tensor {stored.name!r} holds NaN or Inf; allow_nonfinite converts it as it is."
        )


def is_finite(values: torch.Tensor) -> bool:
    """By the extremes, which NaN and infinity pass through: forty times as fast as looking at each."""
    return values.numel() == 0 or all(bool(extreme.isfinite()) for extreme in torch.aminmax(values))


@dataclass(frozen=True)
class Projection:
    """A matrix or bias of a feed-forward network: a tensor of the dense class, or one half of its rows."""

    name: str
    half: int | None = None
    transposed: bool = False

    def shape(self, source: Source) -> tuple[int, ...]:
        shape = source.shape_of(self.name)[:: -1 if self.transposed else 1]
        return shape if self.half is None else (shape[0] // 2, *shape[1:])

    def read(self, source: Source) -> torch.Tensor:
        """(out, in) or (out,)."""
        tensor = source.read(self.name)
        tensor = tensor.T if self.transposed else tensor
        return tensor if self.half is None else tensor.chunk(2)[self.half]


@dataclass(frozen=True)
class Network:
    """One layer's feed-forward network.

    Args:
        layer: its index.
        prefix: the layer's name.
        weight, bias: role ("gate", "up", "down") -> where it lies.
        norm: names of the weight, and the bias if there is one, of the norm that makes its input.
    """

    layer: int
    prefix: str
    weight: dict[str, Projection]
    bias: dict[str, Projection]
    norm: tuple[str, ...]

    def projections(self, kind: str) -> dict[str, Projection]:
        return self.weight if kind == "weight" else self.bias

    @property
    def names(self) -> list[str]:
        """Of its tensors, norm apart."""
        projections = (*self.weight.values(), *self.bias.values())
        return list(dict.fromkeys(projection.name for projection in projections))


def find_network(family: Family, layer: int, body: str, names) -> Network:
    """The network of `layer` among tensor `names`; `body` is the prefix of the model's body."""
    prefix = body + family.layer.format(layer=layer)
    modules = {"up": family.up, "down": family.down}
    if family.gate is not None:
        modules = {"gate": family.gate, **modules}
    found: dict[str, dict[str, Projection]] = {kind: {} for kind in KINDS}
    for role, module in modules.items():
        for kind in KINDS:
            name = f"{prefix}.{module}.{kind}"
            if name in names:
                fused = family.gate == family.up and role != "down"
                half = ("gate", "up").index(role) if fused else None
                found[kind][role] = Projection(name, half, family.transposed and kind == "weight")
    norm = tuple(name for kind in KINDS if (name := f"{prefix}.{family.norm}.{kind}") in names)
    return Network(layer, prefix, found["weight"], found["bias"], norm)
