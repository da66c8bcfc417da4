"""The plan of a conversion: what will be written, from what, and whether the function is preserved.

Pure: it reads a checkpoint's configuration and headers, allocates no weights and writes nothing.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from huggingface_hub import split_state_dict_into_shards_factory
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import HfMoeError, SourceError, UsageError
from hf_moe.recipe import UpcycleRecipe, parse_layers

from .checkpoint import Checkpoint
from .classes import body_prefix, find_classes, find_family
from .families import Family
from .headers import DTYPES
from .names import check_layer_count, match_names, tensors_of
from .quiet import quiet

EXACT = "exact"
NOT_PRESERVING = "not preserving"
MAX_EXPERTS = 65_536
MAX_LABELS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor of the mixture.

    Args:
        name, dtype, shape: as they will stand in the file (`dtype` in safetensors' words).
        method: "copy", "experts" or "router": a key of `stream.METHODS`.
        sources: names of the source tensors it is made from; of "experts", stacked by rows (gate, then up).
        transposed: whether the source stores (in, out) where the target stores (out, in).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    method: str
    sources: tuple[str, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a conversion will do. With `problems` it can't be carried out.

    Args:
        recipe: what was asked for.
        family: the dense architecture's table.
        config: the mixture's configuration.
        dense_class, moe_class: the model classes before and after.
        tensors: everything that will be written, in order.
        dropped: source tensors that are not carried over -> why.
        exactness: `EXACT` or `NOT_PRESERVING`.
        notes: what a user should know before training the result.
        problems: why it can't be done, each in a sentence.
    """

    recipe: UpcycleRecipe
    family: Family | None = None
    config: PretrainedConfig | None = None
    dense_class: type[PreTrainedModel] | None = None
    moe_class: type[PreTrainedModel] | None = None
    tensors: tuple[TensorPlan, ...] = ()
    dropped: dict[str, str] = field(default_factory=dict)
    exactness: str = EXACT
    notes: tuple[str, ...] = ()
    problems: tuple[HfMoeError, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def shards(self) -> dict[str, list[TensorPlan]]:
        """File name -> the tensors in it."""
        by_name = {tensor.name: tensor for tensor in self.tensors}
        split = split_state_dict_into_shards_factory(
            by_name,
            get_storage_size=lambda tensor: tensor.nbytes,
            get_storage_id=lambda tensor: None,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=self.recipe.max_shard_size,
        )
        return {file: [by_name[name] for name in names] for file, names in split.filename_to_tensors.items()}

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
    config = _moe_config(checkpoint, family, moe_class, recipe, layers)

    expected, tied = tensors_of(dense_class, dense_config)
    names, dropped, problems = match_names(checkpoint, family, dense_class, dense_config, expected, tied)
    tensors: list[TensorPlan] = []
    if not problems:
        tensors = _tensors(checkpoint, family, dense_class, recipe, layers, names)
        problems = _check_target(tensors, moe_class, config, names, expected)
    return Plan(
        recipe=recipe,
        family=family,
        config=config,
        dense_class=dense_class,
        moe_class=moe_class,
        tensors=tuple(tensors),
        dropped=dropped,
        exactness=EXACT if recipe.noise_std == 0 else NOT_PRESERVING,
        notes=tuple(_notes(recipe)),
        problems=tuple(problems),
    )


def _check_numbers(recipe: UpcycleRecipe) -> None:
    """What the mixture's configuration does not check itself."""
    if not 0 <= recipe.noise_std < math.inf:
        raise UsageError(f"noise_std is {recipe.noise_std}, but it must be finite and can't be negative.")
    if not 0 < recipe.router_logit_std < math.inf:
        raise UsageError(
            f"router_logit_std is {recipe.router_logit_std}; it must be finite, and 0 would tie all experts."
        )
    if recipe.num_experts > MAX_EXPERTS:
        raise UsageError(f"num_experts is {recipe.num_experts}, but {MAX_EXPERTS} is the most.")
    if not re.fullmatch(r"[1-9]\d{0,8}\s*[KMGT]B", recipe.max_shard_size, re.IGNORECASE):
        raise UsageError(f"max_shard_size is {recipe.max_shard_size!r}; write a size such as '5GB' or '500MB'.")


def _dense_config(checkpoint: Checkpoint) -> PretrainedConfig:
    num_labels = checkpoint.config.get("num_labels")
    if isinstance(num_labels, int | float) and not num_labels <= MAX_LABELS:  # Transformers names each of them
        raise SourceError(f"{checkpoint.path}: config.json says {num_labels} labels, but {MAX_LABELS} is the most.")
    config_class = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    return _made(config_class, checkpoint.config, SourceError, f"{checkpoint.path}: config.json is refused")


def _moe_config(checkpoint, family, moe_class, recipe: UpcycleRecipe, layers: list[int]) -> PretrainedConfig:
    values = {
        **{name: value for name, value in checkpoint.config.items() if name not in ("model_type", "_name_or_path")},
        "architectures": [moe_class.__name__],
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.num_experts_per_tok,
        "moe_layers": layers,
        "norm_topk_prob": True,
        "router_aux_loss_coef": recipe.router_aux_loss_coef,
        "router_z_loss_coef": recipe.router_z_loss_coef,
    }
    # the dense configuration was accepted, so what is refused now is the recipe's
    return _made(family.config_class, values, UsageError, "upcycle")


def _made(
    config_class: type[PretrainedConfig], values: dict[str, Any], kind: type[HfMoeError], where: str
) -> PretrainedConfig:
    try:
        with quiet():
            return config_class.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise kind(f"{where}: {reason}") from error


def _tensors(checkpoint, family: Family, dense_class, recipe, layers, names) -> list[TensorPlan]:
    """Every source tensor copied, but the chosen layers' projections, which become experts and a router."""
    body = body_prefix(family, dense_class, names)
    replaced: dict[str, list[TensorPlan]] = {}
    for layer in layers:
        prefix = body + family.layer.format(layer=layer)
        plans = _layer_tensors(checkpoint, family, prefix, recipe.num_experts, names)
        replaced.update(plans)
    tensors: list[TensorPlan] = []
    for name, source in names.items():
        info = checkpoint.tensors[source]
        copy = TensorPlan(name=name, dtype=info.dtype, shape=info.shape, method="copy", sources=(source,))
        tensors += replaced.get(name, [copy])
    return tensors


def _layer_tensors(checkpoint, family: Family, prefix: str, num_experts: int, names) -> dict[str, list[TensorPlan]]:
    """Name of each projection's tensor in one layer -> what is written in its place."""
    plans: dict[str, list[TensorPlan]] = {}
    targets: dict[str, tuple[str, ...]] = {"up_proj": (family.up,), "down_proj": (family.down,)}
    if family.gate is not None:
        targets = {"gate_up_proj": (family.gate, family.up), "down_proj": (family.down,)}
    for target, modules in targets.items():
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            found = [f"{prefix}.{module}.{kind}" for module in modules]
            if any(name not in names for name in found):
                continue  # a projection without bias
            infos = [checkpoint.tensors[names[name]] for name in found]
            transposed = family.transposed and kind == "weight"
            shapes = [info.shape[::-1] if transposed else info.shape for info in infos]
            expert = TensorPlan(
                name=f"{prefix}.{family.block}.experts.{target}{suffix}",
                dtype=infos[0].dtype,
                shape=(num_experts, sum(shape[0] for shape in shapes), *shapes[0][1:]),
                method="experts",
                sources=tuple(info.name for info in infos),
                transposed=transposed,
            )
            plans |= {name: [] for name in found[1:]}
            plans[found[0]] = [expert]
    up = f"{prefix}.{family.gate or family.up}.weight"
    norm = [names[name] for kind in ("weight", "bias") if (name := f"{prefix}.{family.norm}.{kind}") in names]
    plans[up].append(
        TensorPlan(
            name=f"{prefix}.{family.block}.gate.weight",
            dtype=plans[up][0].dtype,
            shape=(num_experts, plans[up][0].shape[-1]),
            method="router",
            sources=tuple(norm),
        )
    )
    return plans


def _check_target(tensors: list[TensorPlan], moe_class, config, names, expected) -> list[HfMoeError]:
    """Holds the plan against the mixture's own tensors: each written once, none forgotten, shapes as they must be.

    A difference here is a mistake in a family's table, never the user's.
    """
    target, tied = tensors_of(moe_class, config)
    written = [tensor.name for tensor in tensors]
    problems = [f"{name!r} would be written twice" for name in sorted({n for n in written if written.count(n) > 1})]
    lacking = set(expected) - set(names)  # tied, or optional in the source
    problems += [f"{name!r} would not be written" for name in target if name not in set(written) | tied | lacking]
    for tensor in tensors:
        if tensor.name in target and tensor.shape != tuple(target[tensor.name].shape):
            problems.append(f"{tensor.name!r} would have shape {tensor.shape}, not {tuple(target[tensor.name].shape)}")
        if tensor.name not in target and tensor.name not in names:
            problems.append(f"{tensor.name!r} is not the model's")
    return [SourceError(f"the plan for {moe_class.__name__} does not hold: {problem}.") for problem in problems]


def _notes(recipe: UpcycleRecipe) -> Iterable[str]:
    if recipe.num_experts_per_tok == 1:
        yield "With top-k 1 the renormalised gate is always 1: only the balancing loss will ever train the router."
    if recipe.noise_std == 0:
        yield "The experts start as copies: until they differ, only the balancing loss trains the router."
