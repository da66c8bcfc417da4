"""Which class is written: ours, or one that Transformers itself has for mixtures, where a plan fits it."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import UsageError
from hf_moe.recipe import UpcycleRecipe

from .classes import make_config, sister_name
from .forms import Form
from .mixture import NATIVE
from .scheme import Scheme

if TYPE_CHECKING:
    from .plan import TensorPlan


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is written.

    Args:
        kind: "hf_moe" or "native".
        model_class, config: the mixture's.
        form, written: how its tensors are named on disk, and the mixture's name in its layer there.
        loaded, block: the same in memory.
        renamed: beginning of the dense class's tensor names -> of this one's.
    """

    kind: str
    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    form: Form
    written: str
    loaded: Form
    block: str
    renamed: tuple[str, str] = ("", "")

    def name(self, dense: str) -> str:
        """Of what the dense class calls `dense`."""
        old, new = self.renamed
        return new + dense.removeprefix(old) if dense.startswith(old) else dense

    def in_memory(self, tensors: "Iterable[TensorPlan]") -> "list[TensorPlan]":
        """The planned tensors as the class holds them: what is written expert by expert is stacked."""
        if self.form is self.loaded:
            return list(tensors)
        made: list[TensorPlan] = []
        experts: dict[tuple[str, str], list[TensorPlan]] = defaultdict(list)
        for tensor in tensors:
            before, _, after = tensor.name.partition(f".{self.written}.")
            if tensor.layer < 0:
                made.append(tensor)
            elif tensor.method == "experts":
                experts[before, tensor.kind].append(tensor)
            else:
                made.append(replace(tensor, name=f"{before}.{self.block}.{after}"))
        for (before, kind), parts in experts.items():
            for name, roles in self.loaded.experts.items():
                name = f"{before}.{name.format(block=self.block)}{self.loaded.endings[kind]}"
                made += _stacked(name, roles, parts)
        return made


def _stacked(name: str, roles: tuple[str, ...], parts: "list[TensorPlan]") -> "Iterable[TensorPlan]":
    """One tensor `name`, if `parts` hold the same experts, each once, of each of `roles`."""
    held = [[part for part in parts if part.roles == (role,)] for role in roles]
    experts = [[part.experts[0] for part in of_role] for of_role in held]
    shapes = {(part.roles, part.shape) for of_role in held for part in of_role}
    if all(list(range(len(experts[0]))) == of_role for of_role in experts) and len(shapes) == len(roles):
        rows = sum(of_role[0].shape[0] for of_role in held)
        shape = (len(experts[0]), rows, *held[0][0].shape[1:])
        yield replace(held[0][0], name=name, shape=shape, roles=roles, experts=tuple(experts[0]))


@dataclass(frozen=True, kw_only=True)
class Native:
    """One of Transformers' mixtures, as what a dense architecture may become.

    Args:
        model_type: of the mixture.
        names: fact of a plan (see `_facts`) -> the configuration's name for it; of what has none, the fact must be as
            `WITHOUT` says.
        fixed: further values of the configuration.
        carried: of the dense configuration's own values those that the mixture reads, though it does not declare them.
        needs: value of the dense configuration -> what it must be, and what the mixture has.
        misfits: the dense configuration -> further reasons why it does not fit.
        shared: whether it always has a shared expert.
    """

    model_type: str
    names: dict[str, str]
    fixed: dict[str, Any] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    needs: dict[str, tuple[Any, str]] = field(default_factory=dict)
    misfits: Callable[[PretrainedConfig], Iterable[str]] = lambda config: ()
    shared: bool = False

    @property
    def config_class(self) -> type[PretrainedConfig]:
        return transformers.CONFIG_MAPPING[self.model_type]


# Fact -> what it must be where a class has no name for it, and what such a class is like.
WITHOUT: dict[str, tuple[Any, str]] = {
    "norm_topk_prob": (True, "it always renormalises the chosen gates"),
    "dense_layers": ([], "every layer of it is a mixture"),
    "shared_width": (0, "it has no shared expert"),
    "router_z_loss_coef": (0, "it has no router z-loss"),
    "router_type": ("softmax", "its routers are softmax top-k"),
    "expert_rank": (0, "each of its experts is a network of its own"),
}


def _one_window(config: PretrainedConfig) -> Iterable[str]:
    if config.use_sliding_window and set(config.layer_types) != {"sliding_attention"}:
        yield "its sliding window is that of all layers or of none"


_ALWAYS = {name: name for name in ("num_experts_per_tok", "router_aux_loss_coef")}
_QWEN = _ALWAYS | {
    "num_experts": "num_experts",
    "expert_width": "moe_intermediate_size",
    "norm_topk_prob": "norm_topk_prob",
    "dense_layers": "mlp_only_layers",
}
_MIXTRAL = Native(
    model_type="mixtral",
    names=_ALWAYS | {"num_experts": "num_local_experts", "expert_width": "intermediate_size"},
    fixed={"router_jitter_noise": 0.0},
)

# Dense `model_type` -> what it may become, the best first. (OLMoE is none of them: it normalises queries and keys,
# which no dense architecture here does in its way.)
CANDIDATES: dict[str, tuple[Native, ...]] = {
    "llama": (
        replace(
            _MIXTRAL,
            needs={
                "attention_bias": (False, "its attention has no biases"),
                "mlp_bias": (False, "its experts have no biases"),
            },
        ),
    ),
    "mistral": (_MIXTRAL,),
    "qwen2": (
        Native(
            model_type="qwen2_moe",
            names=_QWEN | {"shared_width": "shared_expert_intermediate_size"},
            fixed={"decoder_sparse_step": 1, "qkv_bias": True},
            shared=True,
        ),
    ),
    "qwen3": (
        Native(
            model_type="qwen3_moe",
            names=_QWEN,
            fixed={"decoder_sparse_step": 1},
            carried=("head_dim",),
            misfits=_one_window,
        ),
    ),
}


def choose_target(
    ours: Target,
    recipe: UpcycleRecipe,
    dense_class: type[PreTrainedModel],
    dense_config: PretrainedConfig,
    layers: list[int],
    scheme: Scheme,
) -> tuple[Target, list[str]]:
    """What `recipe.target` asks for, and what a user should know of the choice.

    Raises:
        UsageError: where it asks for a native class and none fits, with every reason.
    """
    if recipe.target == "hf_moe":
        return ours, []
    facts = _facts(recipe, dense_config, layers, scheme)
    why_not: list[str] = []
    for native in CANDIDATES.get(dense_config.model_type, ()):
        name = sister_name(dense_class, native.config_class)
        if reasons := [*_misfits(native, name, dense_config, facts)]:
            why_not.append(f"{name} does not fit: {'; '.join(reasons)}")
        else:
            target = _native(native, name, recipe, dense_class, dense_config, facts)
            return target, [f"Written as Transformers' own {name}, which loads without remote code."]
    why = ". ".join(why_not) or f"Transformers has no mixture of a {dense_config.model_type}'s form"
    if recipe.target == "native":
        raise UsageError(f"target native: {why}; target hf_moe writes our own class.")
    return ours, [f"Written as our own {ours.model_class.__name__}: {why}."]


def _facts(recipe: UpcycleRecipe, dense_config: PretrainedConfig, layers: list[int], scheme: Scheme) -> dict[str, Any]:
    return {
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.num_experts_per_tok,
        "norm_topk_prob": recipe.norm_topk_prob,
        "router_aux_loss_coef": float(recipe.router_aux_loss_coef),
        "router_z_loss_coef": recipe.router_z_loss_coef,
        "router_type": recipe.router_type,
        "expert_rank": recipe.expert_rank,
        "dense_layers": [i for i in range(dense_config.num_hidden_layers) if i not in layers],
        "expert_width": scheme.expert_width,
        "shared_width": scheme.shared_width,
    }


def _misfits(native: Native, name: str, dense_config: PretrainedConfig, facts: dict[str, Any]) -> Iterable[str]:
    if not hasattr(transformers, name):
        yield "Transformers has no such class"
    for fact, (value, why) in WITHOUT.items():
        if fact not in native.names and facts[fact] != value:
            yield why
    if native.shared and not facts["shared_width"]:
        yield "it has a shared expert (set shared_expert_intermediate_size or shared_expert_weight)"
    for key, (value, why) in native.needs.items():
        if getattr(dense_config, key) != value:
            yield why
    yield from native.misfits(dense_config)


def _native(
    native: Native,
    name: str,
    recipe: UpcycleRecipe,
    dense_class: type[PreTrainedModel],
    dense_config: PretrainedConfig,
    facts: dict[str, Any],
) -> Target:
    model_class = getattr(transformers, name)
    values = {
        **_carried(native, dense_config),
        **native.fixed,
        **{new: facts[fact] for fact, new in native.names.items()},
        "architectures": [name],
    }
    if recipe.dtype is not None:
        values["dtype"] = recipe.dtype
    (written, form), *_, (block, loaded) = NATIVE[native.model_type].blocks
    return Target(
        kind="native",
        model_class=model_class,
        config=make_config(native.config_class, values, UsageError, "target native"),
        form=form,
        written=written,
        loaded=loaded,
        block=block,
        renamed=(f"{dense_class.base_model_prefix}.", f"{model_class.base_model_prefix}."),
    )


def _carried(native: Native, dense_config: PretrainedConfig) -> dict[str, Any]:
    """Of the dense configuration, defaults included: what both classes declare, and what neither does. (What one
    alone declares would mean nothing to the other, or something else.)"""
    own = {field.name for field in fields(dense_config)}
    theirs = {field.name for field in fields(native.config_class)} | set(native.config_class.attribute_map)
    left = {"model_type", "architectures", "transformers_version", "_name_or_path"}
    return {
        key: value
        for key, value in dense_config.to_dict().items()
        if key not in left and ((key in own) == (key in theirs) or key in native.carried)
    }
