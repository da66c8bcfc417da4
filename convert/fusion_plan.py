"""The plan of a fusion: the base's plan, with each expert's networks from a checkpoint of its own."""

import filecmp
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hf_moe.errors import HfMoeError, UsageError
from hf_moe.recipe import ExpertRecipe, FuseRecipe, UpcycleRecipe

from .checkpoint import VOCABULARIES, Checkpoint, open_checkpoint
from .fit import PROMPT_GATES, RANDOM_GATES, read_passages
from .headers import FLOATS
from .network import KINDS
from .plan import Plan, TensorPlan, notes_on, plan_upcycle, widest
from .scheme import NOT_PRESERVING, Exactness
from .texts import load_tokenizer

RANDOM_LOGIT_STD = 0.1
COMPARED = 2**20  # numbers at a time

# What must be the same in all configurations -> in words; the second where more than the experts is taken.
SAME = {
    "num_hidden_layers": "number of layers",
    "hidden_size": "hidden size",
    "vocab_size": "vocabulary size",
    "hidden_act": "activation",
    "hidden_activation": "activation",
    "activation_function": "activation",
    "activation": "activation",
}
SAME_IN_AVERAGES = {
    "num_attention_heads": "number of attention heads",
    "num_key_value_heads": "number of key and value heads",
    "rope_parameters": "rotary positions",
}


def plan_fuse(recipe: FuseRecipe) -> Plan:
    """Plans the fusion, routers apart; what stands in its way is in `problems`, nothing is raised."""
    try:
        return _plan(recipe)
    except HfMoeError as problem:
        return Plan(recipe=_as_upcycling(recipe, recipe.base_model, recipe.revision), problems=(problem,))


def sources_of(plan: Plan) -> list[Checkpoint]:
    """The base first; each checkpoint once."""
    donors = [*plan.donors, *([plan.shared_donor] if plan.shared_donor else [])]
    found = [plan.source.checkpoint, *(donor.source.checkpoint for donor in donors)]
    return list({checkpoint.path.resolve(): checkpoint for checkpoint in found}.values())


def _plan(recipe: FuseRecipe) -> Plan:
    _check_recipe(recipe)
    opened: dict[tuple[str, str | None], Checkpoint] = {}

    def plan_of(model: str, revision: str | None, layers: str | list[int]) -> Plan:
        source = _located(model, revision)
        if source not in opened:
            opened[source] = open_checkpoint(*source)
        found = plan_upcycle(opened[source], replace(_as_upcycling(recipe, *source), moe_layers=layers))
        found.check()
        return found

    base = plan_of(recipe.base_model, recipe.revision, recipe.moe_layers)
    donors = [plan_of(expert.source_model, expert.revision, "all") for expert in recipe.experts]
    shared = [plan_of(expert.source_model, expert.revision, "all") for expert in recipe.shared_experts or []]
    for donor in [*donors, *shared]:
        _check_same(base, donor, recipe)
    plan = replace(base, donors=tuple(donors), shared_donor=shared[0] if shared else None)
    plan = replace(plan, tensors=tuple(_planned(tensor, plan, recipe.rest) for tensor in base.tensors))

    with_base = all(_same_networks(donor, base, base) for donor in [*donors, *shared])
    alike = with_base or all(_same_networks(donor, donors[0], base) for donor in donors[1:])
    changes = [] if with_base else ["experts differ from the base"]
    if any(not _same_tensor(tensor, plan) for tensor in plan.tensors if tensor.method == "average"):
        changes.append("the rest is the experts' average")
    exactness = Exactness(NOT_PRESERVING, tuple(changes), None) if changes else base.exactness
    return replace(plan, exactness=exactness, notes=tuple(_notes(recipe, base, alike)))


def _check_recipe(recipe: FuseRecipe) -> None:
    """What neither types nor the planner check."""
    if len(recipe.experts) < 2:
        raise UsageError(f"experts: names {len(recipe.experts)} checkpoints, but a mixture needs at least 2.")
    if len(recipe.shared_experts or []) > 1:
        raise UsageError(f"shared_experts: names {len(recipe.shared_experts or [])}, but 1 is the most here.")
    if not 0 <= recipe.train_router <= 10**6:
        raise UsageError(f"train_router is {recipe.train_router}, but it is a number of steps, up to a million.")
    for index, expert in enumerate(recipe.experts):
        if expert.residual_scale not in (None, 1):
            raise UsageError(f"experts[{index}]: residual_scale is for shared_experts; routed ones are as they are.")
    for expert in [*recipe.experts, *(recipe.shared_experts or [])]:
        if expert.noise_scale:
            raise UsageError(
                f"{expert.source_model}: noise_scale is not read; experts are the checkpoints as they are."
            )
    for expert in recipe.shared_experts or []:
        if not 0 < _scale(expert) < math.inf:
            raise UsageError(f"shared_experts[0]: residual_scale is {expert.residual_scale}, but must be above 0.")
    if recipe.gate_mode not in RANDOM_GATES or recipe.train_router:
        read_passages(recipe)


def _scale(expert: ExpertRecipe) -> float:
    return 1.0 if expert.residual_scale is None else float(expert.residual_scale)


def _as_upcycling(recipe: FuseRecipe, model: str, revision: str | None) -> UpcycleRecipe:
    """How one checkpoint would become a mixture like this one.

    A shared expert of weight r beside routed ones of 1 would make the output 1 + r times as large, so both are
    divided by that.
    """
    shared = [_scale(expert) for expert in recipe.shared_experts or []]
    std = RANDOM_LOGIT_STD if recipe.router_logit_std is None else recipe.router_logit_std
    return UpcycleRecipe(
        base_model=model,
        revision=revision,
        num_experts=len(recipe.experts),
        num_experts_per_tok=recipe.num_experts_per_tok,
        moe_layers=recipe.moe_layers,
        shared_expert_weight=shared[0] / (1 + shared[0]) if shared else None,
        router_logit_std=std,
        dtype=recipe.dtype,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        router_z_loss_coef=recipe.router_z_loss_coef,
        seed=recipe.seed,
        max_shard_size=recipe.max_shard_size,
        allow_nonfinite=recipe.allow_nonfinite,
    )


def _located(model: str, revision: str | None) -> tuple[str, str | None]:
    """`model` as mergekit writes it: a folder, or a Hub id with "@revision"; "+adapter" is refused."""
    if Path(model).expanduser().is_dir():
        return model, revision
    if "+" in model:
        raise UsageError(f"{model}: adds an adapter; merge it into its base model first (merge_and_unload).")
    name, _, commit = model.partition("@")
    return name, commit or revision


def _check_same(base: Plan, donor: Plan, recipe: FuseRecipe) -> None:
    """Raises UsageError where the two are no models of one kind, with the first difference."""
    here, there = donor.source.checkpoint, base.source.checkpoint
    if donor.family is not base.family:
        raise UsageError(
            f"{here.path}: is a {donor.family.model_type}, but the base {there.source} is a {base.family.model_type}."
        )
    names = SAME | (SAME_IN_AVERAGES if recipe.rest == "average" else {})
    for name, word in names.items():
        one, other = (getattr(plan.config, name, None) for plan in (donor, base))
        if one != other:
            raise UsageError(f"{here.path}: its {word} is {one}, but that of the base {there.source} is {other}.")
    for layer, network in base.networks.items():
        for kind in KINDS:
            shapes = [
                {role: held.shape(plan.source) for role, held in plan.networks[layer].projections(kind).items()}
                for plan in (donor, base)
            ]
            if shapes[0] != shapes[1]:
                raise UsageError(
                    f"{here.path}: the {kind}s of layer {layer}'s feed-forward network ({network.prefix}) are "
                    f"{shapes[0]}, but those of the base {there.source} are {shapes[1]}."
                )
    _check_tokenizers(there, here)


def _check_tokenizers(base: Checkpoint, donor: Checkpoint) -> None:
    if not (base.has_tokenizer and donor.has_tokenizer) or base is donor or _same_files(base.path, donor.path):
        return
    one, other = (load_tokenizer(checkpoint).get_vocab() for checkpoint in (donor, base))
    different = [token for token in one.keys() | other.keys() if one.get(token) != other.get(token)]
    if different:
        token = min(different, key=lambda token: (min(one.get(token, math.inf), other.get(token, math.inf)), token))
        ids = [f"id {held[token]}" if token in held else "no token" for held in (one, other)]
        raise UsageError(
            f"{donor.path}: in its tokenizer {token!r} is {ids[0]}, in that of the base {base.source} {ids[1]}; "
            "experts of other tokens can't be fused."
        )


def _same_files(one: Path, other: Path) -> bool:
    held = [name for name in (*VOCABULARIES, "added_tokens.json") if (one / name).exists() or (other / name).exists()]
    return all(
        (one / name).is_file() and (other / name).is_file() and filecmp.cmp(one / name, other / name, shallow=False)
        for name in held
    )


def _planned(tensor: TensorPlan, plan: Plan, rest: str) -> TensorPlan:
    """As wide as the widest that it comes from; averaged where `rest` says so."""
    if tensor.layer in plan.networks:
        donors = {"experts": plan.donors, "shared": (plan.shared_donor or plan,)}.get(tensor.method, ())
        dtypes = [donor.source.dtype_of(name) for donor in donors for name in _names(donor, tensor)]
        return replace(tensor, dtype=widest([tensor.dtype, *dtypes]))
    if tensor.method != "copy" or rest == "base" or tensor.dtype not in FLOATS:
        return tensor
    for donor in plan.donors:
        if tensor.name not in donor.source.names or donor.source.shape_of(tensor.name) != tensor.shape:
            raise UsageError(
                f"rest 'average': {donor.source.checkpoint.path} has no {tensor.name!r} of shape {list(tensor.shape)} "
                "as the base has; rest 'base' needs none."
            )
    dtypes = [donor.source.dtype_of(tensor.name) for donor in plan.donors]
    return replace(tensor, method="average", dtype=widest(dtypes))


def _names(donor: Plan, tensor: TensorPlan) -> list[str]:
    """Of the donor's tensors that `tensor` is made of."""
    held = donor.networks[tensor.layer].projections(tensor.kind)
    return [held[role].name for role in tensor.roles]


def _same_networks(one: Plan, other: Plan, base: Plan) -> bool:
    """Whether both have the same numbers in the networks that become mixtures; reads up to the first difference."""
    if one.source.checkpoint.path == other.source.checkpoint.path:
        return True
    return all(
        torch.equal(
            held.read(one.source).double(), other.networks[layer].projections(kind)[role].read(other.source).double()
        )
        for layer in base.networks
        for kind in KINDS
        for role, held in one.networks[layer].projections(kind).items()
    )


def _same_tensor(tensor: TensorPlan, plan: Plan) -> bool:
    """Whether base and donors have the same numbers, compared piece by piece."""
    return all(
        torch.equal(one.double(), other.double())
        for donor in plan.donors
        for one, other in zip(
            plan.source.pieces(tensor.name, COMPARED), donor.source.pieces(tensor.name, COMPARED), strict=True
        )
    )


def _notes(recipe: FuseRecipe, base: Plan, alike: bool) -> Iterator[str]:
    if alike:
        yield "All experts are the same network: the routers can't matter until training makes them differ."
    yield from notes_on(base.recipe, alike=False)
    if recipe.gate_mode in RANDOM_GATES:
        yield (
            f"The routers are drawn at random, with logits of deviation {base.recipe.router_logit_std:g}: plain "
            "normal ones would send nearly all of a token to one expert."
        )
        if any(expert.positive_prompts or expert.texts for expert in recipe.experts) and not recipe.train_router:
            yield f"gate_mode {recipe.gate_mode!r} makes no use of the prompts and texts."
    elif recipe.gate_mode not in PROMPT_GATES and any(e.negative_prompts for e in recipe.experts):
        yield f"gate_mode {recipe.gate_mode!r} makes no use of negative_prompts; 'hidden' and 'cheap_embed' do."
    if recipe.shared_experts:
        scale = _scale(recipe.shared_experts[0])
        yield f"The routed experts weigh {1 / (1 + scale):.3g}, the shared one {scale / (1 + scale):.3g}."
    if recipe.architecture:
        yield f"architecture {recipe.architecture!r} is mergekit's choice of classes; ours are written."
