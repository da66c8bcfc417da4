"""Presets for PEFT, which has no default targets for new architectures and does not find fused experts by itself."""

import difflib
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_type_hints

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_moe.errors import UsageError
from hf_moe.modeling.moe_low_rank import LowRankExperts
from hf_moe.routing.hooks import ROUTERS, experts_of

from .freezing import layer_of
from .recipe import fit

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

logger = logging.getLogger(__name__)

PARTS = ("attention", "experts", "router")
PRESET = "attention+experts"

# What a mapping may hold beside LoraConfig's own arguments, and these where its hints say too little or too much.
HINTS: dict[str, Any] = {
    "preset": str,
    "r": int,
    "lora_alpha": float | int | None,
    "lora_dropout": float | int,
    "train_head": bool,
    "init_lora_weights": bool | str,
}
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: value >= 1, "at least 1"),
    "lora_alpha": (lambda value: value is None or value > 0, "above 0"),
    "lora_dropout": (lambda value: 0 <= value < 1, "at least 0 and below 1"),
}
OTHER_NAMES = {"rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}


def adapter_options(settings: str | dict[str, Any]) -> dict[str, Any]:
    """The arguments of `peft_config` that a recipe's `peft` comes to, a preset or a mapping.

    Raises:
        UsageError: for a key, a value or a preset that can't be meant, or where PEFT is not installed.
    """
    given = {"preset": settings} if isinstance(settings, str) else {"preset": PRESET, **settings}
    hints = get_type_hints(_peft().LoraConfig) | HINTS
    for name in given:
        if name not in hints:
            raise UsageError(f"peft: unknown key {name!r}; {_suggestion(str(name), hints)}")
    made = {name: fit(name, value, hints[name], "peft") for name, value in given.items()}
    for name, (holds, words) in LIMITS.items():
        if name in made and not holds(made[name]):
            raise UsageError(f"peft: {name} is {made[name]}; it must be {words}.")
    preset = made["preset"]
    parts = preset.split("+")
    if not set(parts) <= set(PARTS):
        raise UsageError(f"peft {preset!r}: join any of {', '.join(PARTS)} by '+', such as {PRESET!r}.")
    if made.get("lora_dropout") and parts != ["attention"]:
        raise UsageError(f"peft {preset!r}: PEFT has no lora_dropout for experts and routers, only for attention.")
    return made


def _suggestion(name: str, hints: dict[str, Any]) -> str:
    close = [OTHER_NAMES[name]] if name in OTHER_NAMES else difflib.get_close_matches(name, hints, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"choose from {', '.join(HINTS)} and what else LoraConfig takes."


def peft_config(
    model: PreTrainedModel,
    preset: str = PRESET,
    *,
    r: int = 8,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    train_head: bool = True,
    **options: Any,
) -> "LoraConfig":
    """A `LoraConfig` for a mixture, ours or one of Transformers' own; targets are found in `model`.

    - "attention": LoRA on every projection of the attention, whatever the family calls it.
    - "experts": on every weight of the experts. PEFT gives each expert a pair of matrices of its own, of rank `r`
      each, though they lie in one parameter: this *is* one LoRA an expert. Shared experts are among them. Biases stay.
    - "router": LoRA on the routers' rows. (Saved whole beside an adapter, `modules_to_save`, they would be about as
      many numbers, but PEFT's `unload` would leave them as trained.)
    - any of these, joined by "+".

    Args:
        model: what is to be adapted; without an adapter yet.
        r: rank of each pair of matrices.
        lora_alpha: what is added counts by lora_alpha / r; by default 2·r.
        lora_dropout: on the adapters' inputs; PEFT has none for experts and routers.
        train_head: whether a head with classes, no vocabulary, is trained whole and saved along.
        options: further arguments of `LoraConfig`.

    Raises:
        UsageError: as in `adapter_options`, or where what the preset names is not there.
    """
    named = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "train_head": train_head}
    given = adapter_options({"preset": preset, **named, **options})
    parts = given.pop("preset").split("+")
    modules: set[str] = set()
    parameters: set[str] = set()
    heads = sorted({*_heads(model), *_new(model)}) if given.pop("train_head") else []
    if "attention" in parts:
        modules |= set(_attention(model))
    if "experts" in parts:
        parameters |= set(_expert_weights(model))
        modules |= set(_shared_experts(model))
    if "router" in parts:
        parameters |= set(_router_weights(model))
    if parameters:  # PEFT can't have both: what it must be told of a Conv1D, it refuses for parameters
        conv1ds = {name for name in modules if _is_conv1d(model, name)}
        parameters |= {f"{name}.weight" for name in conv1ds}
        modules -= conv1ds
    if given["lora_alpha"] is None:
        given["lora_alpha"] = 2 * given["r"]
    values: dict[str, Any] = {
        "target_modules": sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "modules_to_save": heads or None,
        "fan_in_fan_out": any(_is_conv1d(model, name) for name in modules),
    }
    with _in_a_line():
        return _peft().LoraConfig(**{**values, **given})


def add_adapter(model: PreTrainedModel, config: "str | LoraConfig" = PRESET, **options: Any) -> "PeftModel":
    """`get_peft_model` with a preset of `peft_config` (and its `options`), or with a configuration of your own; warns
    where no expert is trained.

    Raises:
        UsageError: as in `peft_config`, or where PEFT can't add it to `model`.
    """
    peft: Any = _peft()
    wanted: Any = config
    if not isinstance(wanted, peft.PeftConfig):
        wanted = peft_config(model, wanted, **options)
    with _in_a_line():
        adapted = peft.get_peft_model(model, wanted)
    if frozen := frozen_experts(adapted):
        logger.warning(frozen)
    return adapted


def frozen_experts(model: nn.Module) -> str | None:
    """A warning, if some of `model` is trained, but none of its experts; None also for a model without any."""
    try:
        names = experts_of(model)
    except UsageError:
        return None
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    held = [parameter for name in names.values() for parameter in model.get_submodule(name).parameters()]
    if not trained or any(parameter.requires_grad for parameter in held):
        return None
    in_experts = sum(parameter.numel() for parameter in held)
    return (
        f"The experts stay frozen: {trained:,} parameters are trained, and none of the {in_experts:,} in the experts "
        f"of {len(names)} layers. LoRA's target_modules never reach them, since they lie in one "
        "parameter; the preset 'attention+experts' does (or target_parameters)."
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise UsageError("peft is not installed; `pip install 'hf_moe[train]'` brings it.") from error
    return peft


@contextmanager
def _in_a_line() -> Iterator[None]:
    """What PEFT refuses."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UsageError(f"peft: {' '.join(str(error).split())}") from error


def _in_layer(name: str) -> str:
    """What follows the last index in a module's name: what it is called in every layer."""
    return re.split(r"\.\d+\.", name)[-1]


def _attention(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        inside = re.search(r"\.\d+\.(.*\.)?\w*(attn|attention)\w*\.", f".{name}")
        if inside and isinstance(module, nn.Linear | Conv1D):
            yield _in_layer(name)


def _expert_weights(model: nn.Module) -> Iterator[str]:
    for name in experts_of(model).values():
        experts = model.get_submodule(name)
        if isinstance(experts, LowRankExperts):
            raise UsageError(
                "peft: these experts differ by matrices of low rank already (expert_rank); train those, without PEFT."
            )
        for tensor, parameter in experts.named_parameters():
            if parameter.ndim == 3:
                yield f"{_in_layer(name)}.{tensor}"


def _shared_experts(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if "shared_expert" in name.split(".") and isinstance(module, nn.Linear):
            yield _in_layer(name)


def _router_weights(model: nn.Module) -> Iterator[str]:
    for name in experts_of(model).values():
        block = name.rpartition(".")[0]
        held = (word for word in ROUTERS if hasattr(model.get_submodule(block), word))
        yield from (f"{_in_layer(block)}.{word}.weight" for word in held)


def _heads(model: PreTrainedModel) -> list[str]:
    """Children with weights beside the body, where they are not a language model's."""
    if model.base_model is model or model.get_output_embeddings() is not None:
        return []
    children = model.named_children()
    return [
        name for name, child in children if child is not model.base_model and any(True for _ in child.parameters())
    ]


def _new(model: PreTrainedModel) -> set[str]:
    """Modules outside layers that the checkpoint had no weights for, such as a pooler: else they would stay as drawn,
    and be drawn anew with every loading."""
    new = getattr(model, "new_weights", [])
    return {name.rpartition(".")[0] for name in new if layer_of(name) is None} - {""}


def _is_conv1d(model: nn.Module, in_layer: str) -> bool:
    return any(isinstance(m, Conv1D) and _in_layer(name) == in_layer for name, m in model.named_modules())
