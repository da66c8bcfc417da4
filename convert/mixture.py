"""A mixture checkpoint as it lies on disk, ours or one of Transformers' own: where each expert, router and shared
expert is, and what it holds, read one expert at a time."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig

from hf_moe.errors import SourceError

from .checkpoint import Checkpoint
from .classes import make_config
from .families import FAMILIES
from .forms import Form, our_form, separate_form
from .headers import TensorInfo
from .names import check_layers, layer_pattern
from .network import KINDS


@dataclass(frozen=True)
class Layout:
    """Where an architecture keeps its mixtures.

    Args:
        layer: name of a layer in the model's body, with `{layer}` for its index.
        blocks: names that the mixture has in its layer on disk -> the form of its tensors; what is written, first.
    """

    layer: str
    blocks: tuple[tuple[str, Form], ...]


_STACKED, _BY_ROLE = our_form(gated=True), separate_form(gate="gate_proj", up="up_proj", down="down_proj")
_SHARED_GATE = "{block}.shared_expert_gate.weight"

# `model_type` of Transformers' own mixtures; each is read with its experts apart, as it is published, or stacked.
NATIVE: dict[str, Layout] = {
    "mixtral": Layout(
        "layers.{layer}",
        (("block_sparse_moe", separate_form(gate="w1", up="w3", down="w2")), ("mlp", _STACKED)),
    ),
    "olmoe": Layout("layers.{layer}", (("mlp", _BY_ROLE), ("mlp", _STACKED))),
    "qwen2_moe": Layout(
        "layers.{layer}",
        (
            ("mlp", replace(_BY_ROLE, shared_gate=_SHARED_GATE)),
            ("mlp", replace(_STACKED, shared_gate=_SHARED_GATE)),
        ),
    ),
    "qwen3_moe": Layout("layers.{layer}", (("mlp", _BY_ROLE), ("mlp", _STACKED))),
}
_OURS = {family.config_class.model_type: family for family in FAMILIES.values()}


def is_mixture(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is that of a mixture that `open_mixture` reads."""
    return config.get("model_type") in _OURS or config.get("model_type") in NATIVE


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """A mixture checkpoint. Nothing is read before it is asked for.

    Args:
        checkpoint: where the tensors lie.
        config: its configuration.
        layers: those that are mixtures, in order.
        num_experts, top_k, norm_topk_prob: as its routers have them.
        body: what stands before a layer's name.
        layer: name of a layer, with `{layer}` for its index.
        block: the mixture's name in its layer.
        form: how its tensors are named.
        roles: of the projections an expert has: "up" and "down", and "gate" where it is gated.
        kinds: of the experts' tensors: "weight", and "bias" where they have biases.
        width, shared_width: neurons of one expert, and of the shared one (0: there is none).
        rank: above 0, experts are one network plus matrices of this rank (`LowRankExperts`); here they are whole.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    norm_topk_prob: bool
    body: str
    layer: str
    block: str
    form: Form
    roles: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    width: int = 0
    shared_width: int = 0
    rank: int = 0

    @property
    def inputs(self) -> str:
        """What its model reads: "input_ids", or the name of something else."""
        family = _OURS.get(self.config.model_type)
        return "input_ids" if family is None else family.inputs

    def prefix(self, layer: int) -> str:
        """The layer's name."""
        return self.body + self.layer.format(layer=layer)

    def projection(self, layer: int, role: str, kind: str, expert: int) -> torch.Tensor:
        """(out, in), or (out,) where `kind` is "bias"; of a stacked tensor only this expert's bytes are read."""
        held = _read(self.checkpoint, self.place(layer, role, kind, expert))
        if not self.rank or kind == "bias":
            return held
        a, b = (_read(self.checkpoint, info) for info in self.factor_places(layer, role, expert))
        wide = torch.promote_types(held.dtype, torch.float32)
        return (held.to(wide) + b.to(wide) @ a.to(wide)).to(held.dtype)

    def projection_pieces(
        self, layer: int, role: str, kind: str, expert: int, piece_bytes: int
    ) -> Iterator[torch.Tensor]:
        """The values of `projection` in order, flat, at most `piece_bytes` at a time."""
        if self.rank:
            return iter(self.projection(layer, role, kind, expert).view(-1).split(max(1, piece_bytes // 8)))
        info = self.place(layer, role, kind, expert)
        return replace(self.checkpoint, tensors={info.name: info}).read_pieces(info.name, piece_bytes)

    def router(self, layer: int) -> torch.Tensor:
        """(experts, in)."""
        return self.checkpoint.read(self.name(layer, self.form.router))

    def shared(self, layer: int, role: str, kind: str) -> torch.Tensor:
        """The shared expert's projection, as in `projection`."""
        return self.checkpoint.read(self.name(layer, f"{self.form.shared[role]}.{kind}"))

    def shared_gate(self, layer: int) -> torch.Tensor | None:
        """(1, in): the shared expert counts by the sigmoid of this on its input; None: it counts fully."""
        name = self.name(layer, self.form.shared_gate) if self.form.shared_gate else ""
        return self.checkpoint.read(name) if name in self.checkpoint.tensors else None

    def names(self, layer: int) -> list[str]:
        """Every tensor of the layer's mixture."""
        start = self.name(layer, "{block}.")
        return [name for name in self.checkpoint.tensors if name.startswith(start)]

    def name(self, layer: int, name: str, expert: int | str = "") -> str:
        """On disk, of what the form calls `name`."""
        return f"{self.prefix(layer)}.{name.format(block=self.block, expert=expert)}"

    def place(self, layer: int, role: str, kind: str, expert: int) -> TensorInfo:
        """Where it lies; KeyError where it does not."""
        name, roles = self.form.holding(role)
        info = self.checkpoint.tensors[self.name(layer, name, expert) + self.form.endings[kind]]
        if self.form.stacked:
            held, count = (0, 1) if self.rank else (expert, self.num_experts)
            info = part(info, held, count, info.shape[1:])
        return part(info, roles.index(role), len(roles), (info.shape[0] // len(roles), *info.shape[1:]))

    def factors(self, layer: int) -> list[str]:
        """Names of the layer's matrices of low rank."""
        weights = [self.name(layer, name) + self.form.endings["weight"] for name in self.form.experts]
        return [f"{name}_{factor}" for name in weights for factor in "ab"] if self.rank else []

    def factor_places(self, layer: int, role: str, expert: int) -> tuple[TensorInfo, TensorInfo]:
        """A (rank, in) and B (out, rank), whose product the expert's projection has beside what all share."""
        name, roles = self.form.holding(role)
        weight = self.name(layer, name) + self.form.endings["weight"]
        a, b = (self.checkpoint.tensors[f"{weight}_{factor}"] for factor in "ab")
        a, b = (part(info, expert, self.num_experts, info.shape[1:]) for info in (a, b))
        return a, part(b, roles.index(role), len(roles), (b.shape[0] // len(roles), b.shape[1]))


def part(info: TensorInfo, index: int, count: int, shape: tuple[int, ...]) -> TensorInfo:
    """The `index`-th of `count` equal parts that follow each other in the file."""
    return replace(info, start=info.start + index * (info.nbytes // count), shape=shape)


def _read(checkpoint: Checkpoint, info: TensorInfo) -> torch.Tensor:
    return replace(checkpoint, tensors={info.name: info}).read(info.name)


def open_mixture(checkpoint: Checkpoint) -> Mixture:
    """The mixture that a checkpoint holds.

    Raises:
        SourceError: where it holds none that is known, or its tensors are not those that its configuration promises.
    """
    layout = _layout(checkpoint)
    config = config_of(checkpoint)
    layers, body, block, form = _find(checkpoint, layout)
    _check_layers(checkpoint, config, layout, layers)
    mixture = Mixture(
        checkpoint=checkpoint,
        config=config,
        layers=layers,
        num_experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        norm_topk_prob=getattr(config, "norm_topk_prob", True),  # Mixtral always does
        body=body,
        layer=layout.layer,
        block=block,
        form=form,
        rank=getattr(config, "expert_rank", 0),
    )
    return _measured(mixture)


def _layout(checkpoint: Checkpoint) -> Layout:
    model_type = str(checkpoint.config.get("model_type"))
    if model_type in NATIVE:
        return NATIVE[model_type]
    if model_type not in _OURS:
        known = ", ".join([*_OURS, *NATIVE])
        raise SourceError(f"{checkpoint.path}: model_type {model_type!r} is no mixture known here; known are {known}.")
    family = _OURS[model_type]
    return Layout(family.layer, ((family.block, our_form(family.gate is not None)),))


def config_of(checkpoint: Checkpoint) -> PretrainedConfig:
    """Its configuration; errors as in `open_mixture`."""
    _layout(checkpoint)
    model_type = str(checkpoint.config["model_type"])
    config_class = _OURS[model_type].config_class if model_type in _OURS else transformers.CONFIG_MAPPING[model_type]
    return make_config(config_class, checkpoint.config, SourceError, f"{checkpoint.path}: config.json is refused")


def _find(checkpoint: Checkpoint, layout: Layout) -> tuple[tuple[int, ...], str, str, Form]:
    """The layers that have a router, what stands before their names, and the form their tensors have."""
    for block, form in layout.blocks:
        router = re.compile(rf"(.*?){layer_pattern(layout.layer)}\.{re.escape(form.router.format(block=block))}")
        held = [match for name in checkpoint.tensors if (match := router.fullmatch(name))]
        first = next(iter(form.experts)).format(block=block, expert=0) + form.endings["weight"]
        if held and held[0][0].replace(form.router.format(block=block), first) in checkpoint.tensors:
            return tuple(sorted(int(match[2]) for match in held)), held[0][1], block, form
    model_type = checkpoint.config["model_type"]
    raise SourceError(f"{checkpoint.path}: none of its tensors are the experts of a {model_type}.")


def _check_layers(checkpoint: Checkpoint, config: PretrainedConfig, layout: Layout, layers: tuple[int, ...]) -> None:
    """(Counted among the tensors first: a configuration may promise layers by the billion.)"""
    check_layers(checkpoint, checkpoint.tensors, layout.layer, config.num_hidden_layers)
    promised = mixture_layers(config)
    if promised != list(layers):
        raise SourceError(
            f"{checkpoint.path}: config.json says that layers {promised} are mixtures, but the weights have routers "
            f"in layers {list(layers)}."
        )


def mixture_layers(config: PretrainedConfig) -> list[int]:
    """The layers that are mixtures, in order, of our configurations and of Transformers'."""
    indices = getattr(config, "moe_layer_indices", None)
    if indices is not None:
        return list(indices)
    dense, step = getattr(config, "mlp_only_layers", None) or [], getattr(config, "decoder_sparse_step", 1)
    return [i for i in range(config.num_hidden_layers) if i not in dense and (i + 1) % step == 0]


def _measured(mixture: Mixture) -> Mixture:
    """With roles, kinds and widths, once every tensor was found where it must be, of one shape in all layers."""
    path, tensors = mixture.checkpoint.path, mixture.checkpoint.tensors
    roles = tuple(role for held in mixture.form.experts.values() for role in held)
    first, name = mixture.layers[0], mixture.form.holding("up")[0]
    biased = mixture.name(first, name, 0) + mixture.form.endings["bias"] in tensors
    shared = mixture.name(first, f"{mixture.form.shared['up']}.weight")
    measured = replace(
        mixture,
        roles=roles,
        kinds=KINDS if biased else KINDS[:1],
        shared_width=tensors[shared].shape[0] if shared in tensors else 0,
    )
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for layer in measured.layers:
        try:
            _check_router(measured, layer)
            for role, kind, info in _all_projections(measured, layer):
                if info.shape != shapes.setdefault((role, kind), info.shape):
                    shape = shapes[role, kind]
                    raise SourceError(f"{path}: tensor {info.name!r} holds {info.shape}, where others hold {shape}.")
        except KeyError as error:
            raise SourceError(f"{path}: tensor {error} is missing.") from error
    return replace(measured, width=shapes["up", "weight"][0])


def _check_router(mixture: Mixture, layer: int) -> None:
    info = mixture.checkpoint.tensors[mixture.name(layer, mixture.form.router)]
    if info.shape[0] != mixture.num_experts:
        raise SourceError(
            f"{mixture.checkpoint.path}: tensor {info.name!r} routes to {info.shape[0]} experts, but config.json says "
            f"{mixture.num_experts}."
        )


def _all_projections(mixture: Mixture, layer: int) -> Iterator[tuple[str, str, TensorInfo]]:
    for role in mixture.roles:
        for kind in mixture.kinds:
            for expert in range(mixture.num_experts):
                info = mixture.place(layer, role, kind, expert)
                if mixture.form.stacked and not _holds_all(mixture, layer, role, kind):
                    raise SourceError(f"{mixture.checkpoint.path}: tensor {info.name!r} does not hold every expert.")
                yield role, kind, info


def _holds_all(mixture: Mixture, layer: int, role: str, kind: str) -> bool:
    tensors = mixture.checkpoint.tensors
    name = mixture.name(layer, mixture.form.holding(role)[0]) + mixture.form.endings[kind]
    if not mixture.rank:
        return tensors[name].shape[0] == mixture.num_experts
    if kind == "bias":
        return tensors[name].shape[0] == 1
    _, rows, columns = tensors[name].shape
    return (tensors[name].shape[0], tensors[f"{name}_a"].shape, tensors[f"{name}_b"].shape) == (
        1,
        (mixture.num_experts, mixture.rank, columns),
        (mixture.num_experts, rows, mixture.rank),
    )
