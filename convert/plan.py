"""The plan of a conversion: what will be written, from what, and whether the function is preserved.

Pure: it reads a checkpoint's configuration and headers, allocates no weights and writes nothing.
"""

import functools
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import HfMoeError, SourceError, UsageError
from hf_moe.recipe import UpcycleRecipe, parse_layers

from .checkpoint import Checkpoint
from .classes import body_classes, body_prefix, find_classes, find_family, make_config
from .families import Family
from .forms import our_form
from .headers import DTYPES, SAFETENSORS_NAMES
from .names import check_layer_count, lacks_head, match_names, tensors_of
from .native import Target, choose_target
from .network import KINDS, Network, Source, find_network
from .scheme import VARIABLE, Exactness, Scheme, behind_sigmoid, scheme_of

# Kind of router -> the tensor that it has beside its weight, and starts as 0.
ROUTER_EXTRAS = {"noisy": "noise_weight", "sigmoid": "e_score_correction_bias"}

MAX_EXPERTS = 65_536
MAX_LABELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor that will be written.

    Args:
        name, dtype, shape: as they will stand in the file (`dtype` in safetensors' words).
        method: how it is made: a key of `stream.METHODS`.
        sources: the dense class's names of the tensors it is made from.
        layer: of a mixture's tensors, the layer; of others -1.
        kind: "weight" or "bias".
        roles: whose rows it holds, in order, of "gate", "up" and "down".
        experts: the experts in it, in order.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    sources: tuple[str, ...]
    layer: int = -1
    kind: str = "weight"
    roles: tuple[str, ...] = ()
    experts: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do. With `problems` it can't be carried out.

    Args:
        recipe: what was asked for.
        family: the dense architecture's table.
        source: the dense checkpoint, its tensors by the dense class's names.
        target: what is made: class, configuration, names.
        dense_class: the model class before.
        networks: layer -> the feed-forward network that becomes a mixture.
        schemes: layer -> how it does, in numbers.
        donors: for each expert the plan of the checkpoint whose networks it is; empty: all are `source`'s.
        shared_donor: the same for the shared expert.
        routers: layer -> (E, D) the router's rows, where they are fitted and not drawn.
        features: layer -> (F, N) what neurons are clustered by, where they are measured on text.
        deals: layer -> how its neurons are dealt, filled in while writing.
        tensors: everything that will be written, in order.
        dropped: source tensors that are not carried over -> why.
        exactness: whether the start is the dense function.
        notes: what a user should know before training the result.
        problems: why it can't be done, each in a sentence.
    """

    recipe: UpcycleRecipe
    # these four stand in every plan without problems
    family: Family = None  # type: ignore[assignment]
    source: Source = None  # type: ignore[assignment]
    target: Target = None  # type: ignore[assignment]
    dense_class: type[PreTrainedModel] = None  # type: ignore[assignment]
    networks: dict[int, Network] = field(default_factory=dict)
    schemes: dict[int, Scheme] = field(default_factory=dict)
    donors: tuple["Plan", ...] = ()
    shared_donor: "Plan | None" = None
    routers: dict[int, torch.Tensor] = field(default_factory=dict)
    features: dict[int, torch.Tensor] = field(default_factory=dict)
    deals: dict[int, Any] = field(default_factory=dict, repr=False)
    tensors: tuple[TensorPlan, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    exactness: Exactness = field(default_factory=Exactness)
    notes: tuple[str, ...] = ()
    problems: tuple[HfMoeError, ...] = ()

    @property
    def config(self) -> PretrainedConfig:
        """The mixture's configuration."""
        return self.target.config

    @property
    def moe_class(self) -> type[PreTrainedModel]:
        """The mixture's model class."""
        return self.target.model_class

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def giver(self, expert: int) -> "Plan":
        """By whose source and networks `expert` is made."""
        return self.donors[expert] if self.donors else self

    def check(self) -> None:
        """Raises the first of `problems`, saying how many more there are."""
        if self.problems:
            first, more = self.problems[0], len(self.problems) - 1
            raise type(first)(f"{first} (and {more} more of the kind)" if more else str(first)) from first


def plan_upcycle(checkpoint: Checkpoint, recipe: UpcycleRecipe) -> Plan:
    """Plans the conversion of `checkpoint`; what stands in its way is in `problems`, nothing is raised."""
    try:
        return _plan(checkpoint, recipe)
    except HfMoeError as problem:
        return Plan(recipe=recipe, problems=(problem,))


def _plan(checkpoint: Checkpoint, recipe: UpcycleRecipe) -> Plan:
    _check_numbers(recipe)
    family = find_family(checkpoint)
    dense_class, moe_class = find_classes(checkpoint, family)
    dense_config = _dense_config(checkpoint)
    check_layer_count(checkpoint, family, dense_config.num_hidden_layers)
    layers = parse_layers(recipe.moe_layers, dense_config.num_hidden_layers)

    expected, tied = tensors_of(dense_class, dense_config)
    notes = list(notes_on(recipe))
    if lacks_head(checkpoint, family, dense_class, expected, tied):
        notes.append(f"config.json names {dense_class.__name__}, but its head is not here: the body is converted.")
        dense_class, moe_class = body_classes(family)
        expected, tied = tensors_of(dense_class, dense_config)
    names, dropped, problems = match_names(checkpoint, family, dense_class, dense_config, expected, tied)
    if problems:
        return Plan(recipe=recipe, problems=tuple(problems))
    dtype = None if recipe.dtype is None else SAFETENSORS_NAMES[getattr(torch, recipe.dtype)]
    source = Source(checkpoint, names, dtype, recipe.allow_nonfinite)
    body = body_prefix(family, dense_class, names)
    networks = {layer: find_network(family, layer, body, names) for layer in layers}
    schemes = {layer: _scheme(recipe, source, network) for layer, network in networks.items()}
    scheme = schemes[layers[0]]
    ours = _our_target(family, moe_class, _moe_config(checkpoint, family, moe_class, recipe, layers, scheme))
    target, choice = choose_target(ours, recipe, dense_class, dense_config, layers, scheme)
    if target.form.shared_gate:
        schemes = {layer: behind_sigmoid(scheme) for layer, scheme in schemes.items()}
    tensors = _tensors(source, networks, schemes, target, recipe)
    lacking = {target.name(name) for name in expected if name not in names}  # tied, or optional in the source
    return Plan(
        recipe=recipe,
        family=family,
        source=source,
        target=target,
        dense_class=dense_class,
        networks=networks,
        schemes=schemes,
        tensors=tuple(tensors),
        dropped=dropped,
        exactness=schemes[layers[0]].exactness,
        notes=(*choice, *notes),
        problems=tuple(_check_target(tensors, target, lacking)),
    )


def _our_target(family: Family, moe_class: type[PreTrainedModel], config: PretrainedConfig) -> Target:
    form = our_form(family.gate is not None)
    return Target(
        kind="hf_moe",
        model_class=moe_class,
        config=config,
        form=form,
        written=family.block,
        loaded=form,
        block=family.block,
    )


def _scheme(recipe: UpcycleRecipe, source: Source, network: Network) -> Scheme:
    up = network.weight["up"]
    dtype = str(DTYPES[source.dtype_of(up.name)]).removeprefix("torch.")
    return scheme_of(recipe, up.shape(source)[0], gated="gate" in network.weight, dtype=dtype)


def _check_numbers(recipe: UpcycleRecipe) -> None:
    """What the mixture's configuration does not check itself."""
    if not 0 <= recipe.noise_std < math.inf:
        raise UsageError(f"noise_std is {recipe.noise_std}, but it must be finite and can't be negative.")
    if not 0 < recipe.router_logit_std < math.inf:
        raise UsageError(
            f"router_logit_std is {recipe.router_logit_std}; it must be finite, and 0 would tie all experts."
        )
    if not 0 <= recipe.drop_ratio <= 1:
        raise UsageError(f"drop_ratio is {recipe.drop_ratio}, but it is a share, from 0 to 1.")
    cut = recipe.method == "split" or recipe.granularity > 1 or recipe.shared_expert_intermediate_size > 0
    if recipe.partition != "random" and not cut:
        raise UsageError(f"partition {recipe.partition!r} says how networks are cut, but nothing cuts them here.")
    if recipe.shared_expert_weight is not None and not 0 < recipe.shared_expert_weight < 1:
        raise UsageError(f"shared_expert_weight is {recipe.shared_expert_weight}, but must lie between 0 and 1.")
    if recipe.shared_expert_weight is not None and recipe.shared_expert_intermediate_size:
        raise UsageError(
            "shared_expert_weight makes the whole network a shared expert, shared_expert_intermediate_size some of "
            "its neurons: choose one."
        )
    if recipe.num_experts < 2:
        raise UsageError(f"num_experts is {recipe.num_experts}, but a mixture needs at least 2 experts.")
    if not 1 <= recipe.num_experts_per_tok <= recipe.num_experts:
        raise UsageError(
            f"num_experts_per_tok is {recipe.num_experts_per_tok}, but it must lie between 1 and "
            f"num_experts ({recipe.num_experts})."
        )
    if recipe.num_experts > MAX_EXPERTS:
        raise UsageError(f"num_experts is {recipe.num_experts}, but {MAX_EXPERTS} is the most.")
    check_shard_size(recipe.max_shard_size)


def check_shard_size(text: str) -> None:
    if not re.fullmatch(r"[1-9]\d{0,8}\s*[KMGT]B", text, re.IGNORECASE):
        raise UsageError(f"max_shard_size is {text!r}; write a size such as '5GB' or '500MB'.")


def _dense_config(checkpoint: Checkpoint) -> PretrainedConfig:
    num_labels = checkpoint.config.get("num_labels")
    if isinstance(num_labels, int | float) and not num_labels <= MAX_LABELS:  # Transformers names each of them
        raise SourceError(f"{checkpoint.path}: config.json says {num_labels} labels, but {MAX_LABELS} is the most.")
    config_class = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    return make_config(config_class, checkpoint.config, SourceError, f"{checkpoint.path}: config.json is refused")


def _moe_config(checkpoint, family, moe_class, recipe: UpcycleRecipe, layers, scheme: Scheme) -> PretrainedConfig:
    values = {
        **{name: value for name, value in checkpoint.config.items() if name not in ("model_type", "_name_or_path")},
        "architectures": [moe_class.__name__],
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.num_experts_per_tok,
        "moe_layers": layers,
        "moe_intermediate_size": scheme.expert_width,
        "shared_expert_intermediate_size": scheme.shared_width,
        "expert_rank": recipe.expert_rank,
        "norm_topk_prob": recipe.norm_topk_prob,
        "router_type": recipe.router_type,
        "router_group_size": recipe.granularity,
        "router_aux_loss_coef": recipe.router_aux_loss_coef,
        "router_z_loss_coef": recipe.router_z_loss_coef,
    }
    if recipe.dtype is not None:
        values = {name: value for name, value in values.items() if name != "torch_dtype"} | {"dtype": recipe.dtype}
    # the dense configuration was accepted, so what is refused now is the recipe's
    return make_config(family.config_class, values, UsageError, "upcycle")


def _tensors(
    source: Source, networks: dict[int, Network], schemes: dict[int, Scheme], target: Target, recipe: UpcycleRecipe
) -> list[TensorPlan]:
    """Every source tensor copied, but the networks', in whose place stand experts and a router."""
    instead: dict[str, list[TensorPlan]] = {}
    for layer, network in networks.items():
        first, *others = network.names
        instead[first] = _layer_tensors(source, network, schemes[layer], target, recipe)
        instead |= {name: [] for name in others}
    tensors: list[TensorPlan] = []
    for name in source.names:
        copy = TensorPlan(
            name=target.name(name),
            dtype=source.dtype_of(name),
            shape=source.shape_of(name),
            method="copy",
            sources=(name,),
        )
        tensors += instead.get(name, [copy])
    return tensors


def _layer_tensors(
    source: Source, network: Network, scheme: Scheme, target: Target, recipe: UpcycleRecipe
) -> list[TensorPlan]:
    form, hidden = target.form, network.weight["up"].shape(source)[1]

    def named(name: str, expert: int | str = "") -> str:
        return target.name(f"{network.prefix}.{name.format(block=target.written, expert=expert)}")

    def planned(name: str, kind: str, method: str, roles, experts, width: int, stacked: bool) -> TensorPlan:
        projections = [network.projections(kind)[role] for role in roles]
        rows = sum(hidden if role == "down" else width for role in roles)
        columns = () if kind == "bias" else (width if roles == ("down",) else hidden,)
        return TensorPlan(
            name=named(name, experts[0] if experts else ""),
            dtype=widest(source.dtype_of(projection.name) for projection in projections),
            shape=((len(experts),) if stacked else ()) + (rows, *columns),
            method=method,
            sources=tuple(dict.fromkeys(projection.name for projection in projections)),
            layer=network.layer,
            kind=kind,
            roles=tuple(roles),
            experts=tuple(experts),
        )

    everyone = range(1 if recipe.expert_rank else recipe.num_experts)
    plans: list[TensorPlan] = []
    for kind in KINDS:
        held = network.projections(kind)
        for experts in [everyone] if form.stacked else [range(i, i + 1) for i in everyone]:
            for name, roles in form.experts.items():
                if set(roles) <= set(held):
                    name += form.endings[kind]
                    plans.append(planned(name, kind, "experts", roles, experts, scheme.expert_width, form.stacked))
        if recipe.expert_rank and kind == "weight":
            plans += [factor for tensor in plans for factor in _factors(tensor, recipe)]
        if scheme.shared_width:
            for role in held:
                name = f"{form.shared[role]}.{kind}"
                plans.append(planned(name, kind, "shared", (role,), (), scheme.shared_width, False))
    dtype = source.dtype_of(network.weight["up"].name)
    if scheme.shared_width and form.shared_gate:
        gate = named(form.shared_gate)
        plans.append(
            TensorPlan(name=gate, dtype=dtype, shape=(1, hidden), method="zeros", sources=(), layer=network.layer)
        )
    router = TensorPlan(
        name=named(form.router),
        dtype=dtype,
        shape=(recipe.num_experts, hidden),
        method="router",
        sources=network.norm,
        layer=network.layer,
    )
    extra = ROUTER_EXTRAS.get(getattr(target.config, "router_type", "softmax"))
    if extra is not None:
        name, dtype, shape = form.router.removesuffix("weight") + extra, router.dtype, router.shape
        if extra == "e_score_correction_bias":
            dtype, shape = "F32", shape[:1]
        plans.append(
            TensorPlan(name=named(name), dtype=dtype, shape=shape, method="zeros", sources=(), layer=network.layer)
        )
    return [*plans, router]


def _factors(tensor: TensorPlan, recipe: UpcycleRecipe) -> tuple[TensorPlan, TensorPlan]:
    """The matrices of low rank (`LowRankExperts`) beside what all experts share, (1, out, in)."""
    _, rows, columns = tensor.shape
    experts, rank = recipe.num_experts, recipe.expert_rank
    factor = replace(tensor, sources=(), roles=(), experts=())
    return (
        replace(factor, name=f"{tensor.name}_a", shape=(experts, rank, columns), method="drawn"),
        replace(factor, name=f"{tensor.name}_b", shape=(experts, rows, rank), method="zeros"),
    )


def widest(dtypes: Iterable[str]) -> str:
    wide = functools.reduce(torch.promote_types, (DTYPES[dtype] for dtype in dtypes))
    return SAFETENSORS_NAMES[wide]


def _check_target(tensors: list[TensorPlan], target: Target, lacking: set[str]) -> list[HfMoeError]:
    """Holds the plan against the mixture's own tensors: each written once, none forgotten but those that the source is
    `lacking`, shapes as they must be.

    A difference here is a mistake in a family's table, never the user's.
    """
    wanted, tied = tensors_of(target.model_class, target.config)
    written = Counter(tensor.name for tensor in tensors)
    problems = [f"{name!r} would be written twice" for name, count in written.items() if count > 1]
    made = target.in_memory(tensors)
    held = {tensor.name for tensor in made}
    problems += [f"{name!r} would not be written" for name in wanted if name not in held | tied | lacking]
    for tensor in made:
        if tensor.name in wanted and tensor.shape != tuple(wanted[tensor.name].shape):
            problems.append(f"{tensor.name!r} would have shape {tensor.shape}, not {tuple(wanted[tensor.name].shape)}")
        if tensor.name not in wanted and tensor.method != "copy":
            problems.append(f"{tensor.name!r} is not the model's")
    name = target.model_class.__name__
    return [SourceError(f"the plan for {name} does not hold: {problem}.") for problem in problems]


def notes_on(recipe: UpcycleRecipe, alike: bool = True) -> Iterable[str]:
    """What a user should know before training; `alike`: whether all experts are made of the same network."""
    if recipe.router_type in VARIABLE:
        yield (
            f"With router_type {recipe.router_type!r} num_experts_per_tok is not read: router_"
            f"{'top_p' if recipe.router_type == 'top_p' else 'capacity_factor'} says how many experts a token visits."
        )
    elif recipe.num_experts_per_tok == 1 and recipe.norm_topk_prob:
        yield "With top-k 1 the renormalised gate is always 1: only the balancing loss will ever train the router."
    same = alike and recipe.method == "copy" and recipe.granularity == 1
    if same and recipe.noise_std == 0 and recipe.drop_ratio == 0:
        yield "The experts start as copies: until they differ, only the balancing loss trains the router."
