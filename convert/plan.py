"""The plan of a conversion: what will be written, from what, and whether the function is preserved.

Pure: it reads a checkpoint's configuration and headers, allocates no weights and writes nothing.
"""

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
from hf_moe.modeling import modeling_module
from hf_moe.recipe import UpcycleRecipe, parse_layers

from .checkpoint import DTYPES, FLOATS, Checkpoint, TensorInfo
from .families import FAMILIES, Family
from .quiet import quiet

EXACT = "exact"
NOT_PRESERVING = "not preserving"

# Marks of a configuration that describes a mixture already.
MOE_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

# Why a well-known architecture can't be converted; the rest only lack a table.
WHY_NOT = {
    "transfo-xl": "it left Transformers with version 5; for long context start from ModernBERT",
    "mamba": "it has no feed-forward network to replace",
}


@dataclass(frozen=True, kw_only=True)
class TensorPlan:
    """One tensor of the mixture.

    Args:
        name, dtype, shape: as they will stand in the file (`dtype` in safetensors' words).
        method: "copy", "experts" or "router": a key of `stream.METHODS`.
        sources: names of the source tensors it is made from.
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
    _check_layer_count(checkpoint, family, dense_config.num_hidden_layers)
    layers = parse_layers(recipe.moe_layers, dense_config.num_hidden_layers)
    config = _moe_config(checkpoint, family, moe_class, recipe, layers)

    expected, tied = _shapes(dense_class, dense_config)
    names, dropped, problems = _match(checkpoint, family, dense_class, dense_config, expected, tied)
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
    if recipe.num_experts < 2:
        raise UsageError(f"num_experts is {recipe.num_experts}, but a mixture needs at least 2 experts.")
    if not 1 <= recipe.num_experts_per_tok <= recipe.num_experts:
        raise UsageError(
            f"top-k (num_experts_per_tok) is {recipe.num_experts_per_tok}, but it must lie between 1 and "
            f"num_experts ({recipe.num_experts})."
        )
    if recipe.noise_std < 0:
        raise UsageError(f"noise_std is {recipe.noise_std}, but it can't be negative.")
    if recipe.router_logit_std <= 0:
        raise UsageError(f"router_logit_std is {recipe.router_logit_std}, but 0 would tie all experts.")
    if not re.fullmatch(r"\d+(\.\d+)?\s*[KMGT]?B", recipe.max_shard_size, re.IGNORECASE):
        raise UsageError(f"max_shard_size is {recipe.max_shard_size!r}; write a size such as '5GB' or '500MB'.")


def find_family(checkpoint: Checkpoint) -> Family:
    """The dense family of a checkpoint.

    Raises:
        SourceError: where it asks for remote code, is a mixture already, is quantized, or has no table.
    """
    config, path = checkpoint.config, checkpoint.path
    model_type = config.get("model_type")
    if any(str(model_type) == family.config_class.model_type for family in FAMILIES.values()) or any(
        isinstance(config.get(name), int) and config[name] > 1 for name in MOE_FIELDS
    ):
        raise SourceError(f"{path}: is a mixture of experts already (model_type {model_type!r}); start from a dense one.")
    if config.get("auto_map"):
        raise SourceError(f"{path}: config.json asks for remote code (auto_map), which is never run here.")
    if config.get("quantization_config"):
        raise SourceError(f"{path}: is quantized; start from the unquantized checkpoint.")
    if model_type not in FAMILIES:
        why = WHY_NOT.get(str(model_type), "no table says where its feed-forward networks lie")
        known = ", ".join(FAMILIES)
        raise SourceError(f"{path}: architecture {model_type!r} can't be converted: {why}. Known are {known}.")
    return FAMILIES[model_type]


def moe_classes(family: Family) -> dict[str, type[PreTrainedModel]]:
    """Name of each dense class of the family -> the mixture's class."""
    module = modeling_module(family.config_class)
    classes = [getattr(module, name) for name in module.__all__]
    return {cls.__bases__[1].__name__: cls for cls in classes if "forward" in vars(cls)}


def find_classes(checkpoint: Checkpoint, family: Family) -> tuple[type[PreTrainedModel], type[PreTrainedModel]]:
    """The dense class that a checkpoint names (its body, if it names none), and the mixture's."""
    known = moe_classes(family)
    architectures = checkpoint.config.get("architectures") or [next(iter(_bodies(family)))]
    if not isinstance(architectures, list) or architectures[0] not in known:
        raise SourceError(
            f"{checkpoint.path}: config.json names the class {architectures!r}; known for {family.model_type} are "
            f"{', '.join(sorted(known))}."
        )
    return getattr(transformers, architectures[0]), known[architectures[0]]


def _bodies(family: Family) -> Iterable[str]:
    """Names of the family's dense classes that have no head."""
    return (name for name, cls in moe_classes(family).items() if family.config_class.auto_classes["AutoModel"] == cls.__name__)


def _dense_config(checkpoint: Checkpoint) -> PretrainedConfig:
    config_class = transformers.CONFIG_MAPPING[checkpoint.config["model_type"]]
    return _made(checkpoint, config_class, checkpoint.config)


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
    return _made(checkpoint, family.config_class, values)


def _made(checkpoint: Checkpoint, config_class: type[PretrainedConfig], values: dict[str, Any]) -> PretrainedConfig:
    try:
        return config_class.from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise SourceError(f"{checkpoint.path}: config.json is refused: {reason}") from error


def _check_layer_count(checkpoint: Checkpoint, family: Family, num_hidden_layers: int) -> None:
    """Before anything is built from the configuration: it may promise layers by the billion."""
    layer = re.escape(family.layer).replace(re.escape("{layer}"), r"(\d+)")
    pattern = re.compile(rf"(?:^|\.){layer}\.")
    held = {int(match[1]) for name in checkpoint.tensors if (match := pattern.search(name))}
    if held != set(range(len(held))) or len(held) != num_hidden_layers:
        raise SourceError(
            f"{checkpoint.path}: config.json says {num_hidden_layers} layers, but the weights hold {len(held)}."
        )


def _shapes(model_class: type[PreTrainedModel], config: PretrainedConfig) -> tuple[dict[str, torch.Tensor], set[str]]:
    """The tensors of a model on the meta device, and the names among them that are tied to others."""
    with quiet(), torch.device("meta"):
        try:
            model = model_class(config)
        except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise SourceError(f"config.json describes no {model_class.__name__} that can be built: {reason}") from error
    return model.state_dict(), set(model.all_tied_weights_keys)


def _match(checkpoint: Checkpoint, family: Family, dense_class, dense_config, expected, tied):
    """Each tensor of the source gets the name that the dense class has for it.

    Returns:
        names: dense class's name -> source's name; dropped: source's name -> why; problems.
    """
    names: dict[str, str] = {}
    dropped: dict[str, str] = {}
    problems: list[HfMoeError] = []
    left_over: list[str] = []
    for source in checkpoint.tensors:
        name = _current_name(source, family, dense_class.base_model_prefix, expected)
        if name in names:
            problems.append(SourceError(f"{checkpoint.path}: {names[name]!r} and {source!r} are the same tensor."))
        elif name in expected:
            names[name] = source
        else:
            left_over.append(source)

    for source in left_over:
        reason = next((why for pattern, why in family.dropped.items() if re.search(pattern, source)), None)
        if reason is not None:
            dropped[source] = reason
    left_over = [source for source in left_over if source not in dropped]
    elsewhere = _tensors_of_other_heads(family, dense_config) if left_over else {}
    for source in left_over:
        name = _current_name(source, family, dense_class.base_model_prefix, elsewhere)
        if name in elsewhere:
            names[name] = source  # another head's: carried along, as the dense checkpoint carries it
            expected[name] = elsewhere[name]
        else:
            problems.append(
                SourceError(f"{checkpoint.path}: tensor {source!r} is left over: no {family.model_type} class has it.")
            )
    missing = [name for name in expected if name not in names and name not in tied]
    problems += [SourceError(f"{checkpoint.path}: tensor {name!r} is missing.") for name in missing]
    for name, source in names.items():
        problems += _check_tensor(checkpoint, checkpoint.tensors[source], expected[name])
    return names, dropped, problems


def _current_name(source: str, family: Family, prefix: str, expected: Iterable[str]) -> str:
    """`source` by today's name: old endings renamed, the body's prefix added or taken away as the class has it."""
    for old, new in family.renamed.items():
        if source.endswith(old):
            source = source.removesuffix(old) + new
    candidates = (source, f"{prefix}.{source}", source.removeprefix(f"{prefix}."))
    return next((name for name in candidates if name in expected), source)


def _tensors_of_other_heads(family: Family, dense_config: PretrainedConfig) -> dict[str, torch.Tensor]:
    shapes: dict[str, torch.Tensor] = {}
    for name in moe_classes(family):
        shapes |= _shapes(getattr(transformers, name), dense_config)[0]
    return shapes


def _check_tensor(checkpoint: Checkpoint, info: TensorInfo, meta: torch.Tensor) -> list[HfMoeError]:
    where = f"{checkpoint.path}: tensor {info.name!r}"
    if info.shape != tuple(meta.shape):
        return [SourceError(f"{where} has shape {list(info.shape)}, but config.json makes it {list(meta.shape)}.")]
    if meta.is_floating_point() and info.dtype not in FLOATS:
        return [SourceError(f"{where} has dtype {info.dtype}, but should be a floating-point tensor.")]
    return []


def _tensors(checkpoint, family: Family, dense_class, recipe, layers, names) -> list[TensorPlan]:
    """Every source tensor copied, but the chosen layers' projections, which become experts and a router."""
    body = "" if dense_class.__name__ in _bodies(family) else f"{dense_class.base_model_prefix}."
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
    for module, target in ((family.up, "up_proj"), (family.down, "down_proj")):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            name = f"{prefix}.{module}.{kind}"
            info = checkpoint.tensors[names[name]]
            transposed = family.transposed and kind == "weight"
            plans[name] = [
                TensorPlan(
                    name=f"{prefix}.mlp.experts.{target}{suffix}",
                    dtype=info.dtype,
                    shape=(num_experts, *(reversed(info.shape) if transposed else info.shape)),
                    method="experts",
                    sources=(info.name,),
                    transposed=transposed,
                )
            ]
    up = f"{prefix}.{family.up}.weight"
    norm = [names[name] for kind in ("weight", "bias") if (name := f"{prefix}.{family.norm}.{kind}") in names]
    plans[up].append(
        TensorPlan(
            name=f"{prefix}.mlp.gate.weight",
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
    target, tied = _shapes(moe_class, config)
    written = [tensor.name for tensor in tensors]
    problems = [f"{name!r} would be written twice" for name in sorted({n for n in written if written.count(n) > 1})]
    problems += [f"{name!r} would not be written" for name in target if name not in set(written) | tied]
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
