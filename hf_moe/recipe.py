"""Recipes: what to make from what, as a strict dataclass that reads from and writes to YAML."""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args, get_origin

import yaml
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError

from hf_moe.errors import UsageError

MAX_VALUES = 100_000  # in a recipe, aliases written out

# What a key that can't be left out is for.
REQUIRED = {
    "base_model": "the dense checkpoint to start from",
    "experts": "the checkpoints to fuse",
    "source_model": "the checkpoint that the expert is",
}


def options_of(hint: Any) -> tuple[str, ...]:
    """What a field may be, where its type lists that."""
    parts = (hint,) if get_origin(hint) is Literal else get_args(hint)  # a union's
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def check_range(name: str, value: float, low: float, high: float | None = None) -> None:
    """Raises UsageError where a number is below `low`, above `high`, or none."""
    if not (low <= value and (high is None or value <= high)):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UsageError(f"{name} is {value}; it must be {limits}.")


class Recipe:
    """Reading and writing of the strict dataclasses below."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    other_names: ClassVar[dict[str, str]] = {}  # key that is read too -> field

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> Self:
        """Checks names and types.

        Raises:
            UsageError: for an unknown name (with a suggestion), a missing one, or a value of the wrong type.
        """
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for name in values:
            if name not in names:
                close = difflib.get_close_matches(str(name), [*names, *cls.other_names], n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}."
                raise UsageError(f"{where}: unknown key {name!r}; {hint}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise UsageError(f"{where}: names no {field.name}, {REQUIRED[field.name]}.")
            options, value = options_of(field.type), values.get(field.name)
            if options and value is not None and value not in options:
                raise UsageError(f"{where}: {field.name} is {value!r}; choose from {', '.join(options)}.")
        try:
            return cls(**values)
        except StrictDataclassFieldValidationError as error:
            raise UsageError(f"{where}: {error.__cause__ or error}") from error

    @classmethod
    def from_yaml(cls, file: Path, **overrides: Any) -> Self:
        """Reads `file`; what is given in `overrides` wins. Errors as in `from_dict`, or where it is no mapping."""
        return cls.from_dict({**cls.with_our_names(read_yaml(file), str(file)), **overrides}, where=str(file))

    @classmethod
    def with_our_names(cls, values: dict[str, Any], where: str) -> dict[str, Any]:
        """`values` with the fields' names in place of `other_names`; UsageError where both are there."""
        for other, name in cls.other_names.items():
            if other in values and name in values:
                raise UsageError(f"{where}: gives both {other} and {name}, which are the same; leave one out.")
        return {cls.other_names.get(name, name): value for name, value in values.items()}

    def changed(self) -> dict[str, Any]:
        """What is not as by default."""
        fields = dataclasses.fields(self)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default}

    def to_yaml(self) -> str:
        """The whole recipe, defaults included."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping that `file` holds. Aliases may multiply: what they stand for is counted before it is made.

    Raises:
        UsageError: where it can't be read, is no mapping, too large, or has a key twice.
    """
    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        _check_node(node, file)
        values = None if node is None else loader.construct_document(node)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file}: can't be read as a YAML recipe ({reason}).") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file}: a recipe is a mapping of names to values, such as 'num_experts: 8'.")
    return values


def _check_node(node: yaml.Node | None, file: Path) -> None:
    left, count = [node], 0
    while left:
        node, count = left.pop(), count + 1
        if count > MAX_VALUES:
            raise UsageError(f"{file}: holds more than {MAX_VALUES:,} values, aliases written out.")
        if isinstance(node, yaml.SequenceNode):
            left += node.value
        elif isinstance(node, yaml.MappingNode):
            left += [part for pair in node.value for part in pair]
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := next((key for key in keys if keys.count(key) > 1), None):
                raise UsageError(f"{file}: key {twice!r} stands twice (from line {node.start_mark.line + 1}).")


@strict
@dataclasses.dataclass(frozen=False, kw_only=True)
class UpcycleRecipe(Recipe):
    """How a dense checkpoint becomes a mixture.

    Args:
        base_model: the dense checkpoint: a folder, a GGUF file or a Hub id.
        revision: branch, tag or commit of a Hub checkpoint.
        num_experts: experts a layer.
        num_experts_per_tok: experts that each token is sent to.
        moe_layers: which layers become mixtures: "all", "every-N" (the N-th, 2N-th, …), or their indices.
        method: "copy": experts are copies of the dense network; "split": they are its parts, which does not preserve
            the function unless a token visits all of them.
        granularity: into how many experts each copy is cut; a token then visits whole copies at the start.
        shared_expert_intermediate_size: how many of the network's neurons become a shared expert instead.
        shared_expert_weight: or the whole network becomes a shared expert of this weight (between 0 and 1), and the
            experts get the rest.
        expert_rank: above 0, experts are copies held once, and matrices of this rank by which they come to differ (Li
            et al. 2024, arXiv 2404.15159).
        partition: by what neurons are dealt where a network is cut: "random", "kmeans" (of their weights) or
            "coactivation" (on the text of `calibration`).
        calibration: file of text, one passage a line.
        noise_std: noise on every expert's weight matrices, in units of each matrix's own standard deviation.
        drop_ratio: share of every expert's neurons that start anew.
        norm_topk_prob: whether the chosen gates are renormalised to sum to 1.
        router_type: how experts are chosen: "softmax", "sigmoid", "noisy", "top_p", "expert_choice" or "laplace".
        router_init: "normal": logits of deviation `router_logit_std`; "zero": equal ones, but for ties; "auto": "zero"
            where only that preserves the function.
        router_logit_std: standard deviation that the router's logits start with, on the inputs its norm makes.
        target: "hf_moe": our classes; "native": those that Transformers has for mixtures; "auto": native where
            nothing is lost.
        dtype: of the weights written, such as "bfloat16"; by default each stays what it is.
        router_aux_loss_coef: weight of the load-balancing loss in later training.
        router_z_loss_coef: weight of the router z-loss in later training.
        seed: of everything drawn at random.
        max_shard_size: largest weights file, such as "5GB".
        allow_nonfinite: whether NaN and Inf among the weights are converted as they are.
    """

    base_model: str
    revision: str | None = None
    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_layers: str | list[int] = "all"
    method: Literal["copy", "split"] = "copy"
    granularity: int = 1
    shared_expert_intermediate_size: int = 0
    shared_expert_weight: float | None = None
    expert_rank: int = 0
    partition: Literal["random", "kmeans", "coactivation"] = "random"
    calibration: str | None = None
    noise_std: float | int = 0.0
    drop_ratio: float | int = 0.0
    norm_topk_prob: bool = True
    router_type: str = "softmax"
    router_init: Literal["auto", "normal", "zero"] = "auto"
    router_logit_std: float | int = 0.1
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    target: Literal["hf_moe", "native", "auto"] = "hf_moe"
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    seed: int = 0
    max_shard_size: str = "5GB"
    allow_nonfinite: bool = False


@strict
@dataclasses.dataclass(frozen=False, kw_only=True)
class ExpertRecipe(Recipe):
    """One expert of a `FuseRecipe`.

    Args:
        source_model: the checkpoint whose feed-forward networks it is, a folder or a Hub id.
        revision: branch, tag or commit of a Hub checkpoint.
        positive_prompts: what should be sent to it.
        negative_prompts: what should not ("hidden" and "cheap_embed" take their mean away).
        texts: file of text that should be sent to it, one passage a line.
        noise_scale, residual_scale: mergekit's. The first is refused, the second is for shared experts only.
    """

    source_model: str
    revision: str | None = None
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    texts: str | None = None
    noise_scale: float | int | None = None
    residual_scale: float | int | None = None


@strict
@dataclasses.dataclass(frozen=False, kw_only=True)
class FuseRecipe(Recipe):
    """How several fine-tuned checkpoints of one architecture become one mixture. It reads mergekit's recipes.

    Args:
        base_model: the checkpoint that gives what is no expert; a folder or a Hub id.
        experts: the checkpoints whose feed-forward networks become the experts, and what each is for.
        shared_experts: at most one, which every token visits, beside the routed ones with `residual_scale` times
            their weight.
        revision: branch, tag or commit of the base, if it is a Hub checkpoint.
        gate_mode: how the routers start: "hidden" (mean of the inputs that the prompts make), "cheap_embed" (mean of
            their embeddings), "centroid", "lda", "probe" (classifiers of those inputs), "random", "uniform_random".
        num_experts_per_tok: experts that each token is sent to; `experts_per_token` is read too.
        rest: where everything but the mixtures comes from: the "base", or the "average" of the experts.
        moe_layers: which layers become mixtures, as in `UpcycleRecipe`.
        router_logit_std: standard deviation of a token's logits; by default 1, and 0.1 where the gate is random.
        train_router: for how many steps the routers are trained on the experts' texts, all else frozen.
        dtype: of the weights written; by default each is as wide as the widest that it comes from.
        router_aux_loss_coef, router_z_loss_coef, seed, max_shard_size, allow_nonfinite: as in `UpcycleRecipe`.
        architecture: mergekit's choice of classes to write, which has no meaning here.
    """

    other_names = {"experts_per_token": "num_experts_per_tok"}

    base_model: str
    experts: list[ExpertRecipe]
    shared_experts: list[ExpertRecipe] | None = None
    revision: str | None = None
    gate_mode: Literal["hidden", "cheap_embed", "centroid", "lda", "probe", "random", "uniform_random"] = "hidden"
    num_experts_per_tok: int = 2
    rest: Literal["base", "average"] = "base"
    moe_layers: str | list[int] = "all"
    router_logit_std: float | int | None = None
    train_router: int = 0
    dtype: Literal["float64", "float32", "bfloat16", "float16"] | None = None
    router_aux_loss_coef: float | int = 0.001
    router_z_loss_coef: float | int = 0.0
    seed: int = 0
    max_shard_size: str = "5GB"
    allow_nonfinite: bool = False
    architecture: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "recipe") -> "FuseRecipe":
        """As `Recipe.from_dict`; the experts may be mappings."""
        values = cls.with_our_names(values, where)
        for key in ("experts", "shared_experts"):
            if isinstance(values.get(key), list):
                entries = enumerate(values[key])
                values[key] = [_expert(entry, f"{where}: {key}[{index}]") for index, entry in entries]
        return super().from_dict(values, where)


def _expert(entry: Any, where: str) -> ExpertRecipe:
    if isinstance(entry, ExpertRecipe):
        return entry
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: should be a mapping with source_model, but is a {type(entry).__name__}.")
    return ExpertRecipe.from_dict(entry, where)


def parse_layers(text: str | list[int], num_hidden_layers: int) -> list[int]:
    """Layer indices of "all", "every-2" or "0,3,5" (or of a list), in order.

    Raises:
        UsageError: for another form, an index out of range or twice, or a choice of no layer at all.
    """
    if isinstance(text, list):
        layers = text
    elif text == "all":
        layers = list(range(num_hidden_layers))
    elif match := re.fullmatch(r"every-([1-9]\d{0,5})", text):
        layers = list(range(int(match[1]) - 1, num_hidden_layers, int(match[1])))
    elif re.fullmatch(r"\d{1,6}(,\d{1,6})*", text):
        layers = [int(part) for part in text.split(",")]
    else:
        raise UsageError(f"layers {text!r}: write 'all', 'every-2', or indices such as '0,3,5'.")
    if not layers:
        raise UsageError(f"layers {text!r}: chooses none of the model's {num_hidden_layers} layers.")
    outside = [layer for layer in layers if not 0 <= layer < num_hidden_layers]
    if outside:
        raise UsageError(f"layers {text!r}: no layer {outside[0]}; the model's are 0 to {num_hidden_layers - 1}.")
    if len(set(layers)) != len(layers):
        raise UsageError(f"layers {text!r}: names a layer twice.")
    return sorted(layers)
