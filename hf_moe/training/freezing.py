"""Which parameters train."""

import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hf_moe.errors import UsageError
from hf_moe.routing.hooks import ROUTERS, experts_of

logger = logging.getLogger(__name__)

GRADUAL = re.compile(r"gradual:([1-9]\d{0,8})")


def kind_of(name: str) -> str:
    """What a parameter is part of: "router", "experts" (shared ones too) or "other"."""
    parts = name.split(".")
    if "experts" in parts or any(part.startswith("shared_expert") for part in parts):
        return "experts"
    return "router" if any(part in ROUTERS for part in parts[:-1]) else "other"


def _in_body(name: str, model: nn.Module) -> bool:
    if getattr(model, "base_model", model) is model:
        return True
    return name.startswith(f"{model.base_model_prefix}.")


def is_factor(name: str) -> bool:
    """Whether a parameter is one of the matrices by which experts of low rank differ (`LowRankExperts`)."""
    return "experts" in name.split(".") and name.endswith(("_proj_a", "_proj_b"))


# What each preset leaves frozen: (name, model) -> whether. "gradual:N" is beside these.
PRESETS: dict[str, Callable[[str, nn.Module], bool]] = {
    "none": lambda name, model: False,
    "backbone": _in_body,
    "experts_only": lambda name, model: kind_of(name) != "experts",
    "router_only": lambda name, model: kind_of(name) != "router",
    "all_but_router": lambda name, model: kind_of(name) == "router",
    "low_rank_only": lambda name, model: kind_of(name) != "router" and not is_factor(name),
}
OF_MIXTURES = ("experts_only", "router_only", "all_but_router", "low_rank_only")


def freeze(model: nn.Module, how: str | list[str], *, new: Iterable[str] = ()) -> list[TrainerCallback]:
    """Sets `requires_grad` of every parameter of `model`.

    Args:
        how: a preset of `PRESETS`; "gradual:N" (see `GradualUnfreezing`); or regular expressions, one of which is
            found in the name of each frozen parameter.
        new: parameters that the checkpoint did not have. They train whatever a preset says (patterns are obeyed).

    Returns:
        callbacks that Trainer needs for it.

    Raises:
        UsageError: for an unknown preset, a pattern that matches nothing, or where nothing would train.
    """
    names = [name for name, _ in model.named_parameters()]
    callbacks: list[TrainerCallback] = []
    if isinstance(how, list):
        frozen = _matching(names, how)
    elif gradual := GRADUAL.fullmatch(how):
        callback = GradualUnfreezing(model, int(gradual[1]))
        callbacks.append(callback)
        frozen = callback.frozen_at(0) - set(new)
    elif how in PRESETS:
        _check_mixture(model, how)
        frozen = {name for name in names if PRESETS[how](name, model)} - set(new)
    else:
        raise UsageError(
            f"freeze is {how!r}; choose from {', '.join(PRESETS)}, 'gradual:N' with a number of steps, or a list of "
            "patterns."
        )
    if frozen >= set(names):
        raise UsageError(f"freeze is {how!r}, which leaves nothing of {type(model).__name__} to train.")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    if isinstance(how, list):
        _warn_of_experts(names, frozen)
    return callbacks


def _check_mixture(model: nn.Module, how: str) -> None:
    if how in OF_MIXTURES:
        try:
            experts_of(model)
        except UsageError as error:
            raise UsageError(f"freeze is {how!r}, but {type(model).__name__} is dense.") from error
    if how == "low_rank_only" and not any(is_factor(name) for name, _ in model.named_parameters()):
        raise UsageError(f"freeze is {how!r}, but the experts are networks of their own: upcycle with expert_rank.")


def _matching(names: list[str], patterns: list[str]) -> set[str]:
    frozen: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise UsageError(f"freeze: {pattern!r} is no regular expression ({error}).") from error
        if not found:
            raise UsageError(f"freeze: {pattern!r} matches no parameter; the first is {names[0]!r}.")
        frozen |= found
    return frozen


def _warn_of_experts(names: list[str], frozen: set[str]) -> None:
    experts = {name for name in names if kind_of(name) == "experts"}
    if experts and experts <= frozen:
        logger.warning("All experts stay frozen: the patterns of `freeze` match every one of them.")


def warn_of_router_rate(model: nn.Module, rate: float | None, callbacks: Iterable[TrainerCallback]) -> None:
    """Says that a `router_learning_rate` changes nothing, where the routers stay frozen. (A dense control has none.)

    Args:
        callbacks: what `freeze` returned; layers that wait do train.
    """
    routers = [parameter for name, parameter in model.named_parameters() if kind_of(name) == "router"]
    waiting = any(isinstance(callback, GradualUnfreezing) for callback in callbacks)
    if rate is not None and routers and not waiting and not any(router.requires_grad for router in routers):
        logger.warning("router_learning_rate changes nothing: by `freeze` or `peft` all routers stay frozen.")


def layer_of(name: str) -> int | None:
    """The layer that a module or parameter is of: the first number in its name."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class GradualUnfreezing(TrainerCallback):
    """Trains what lies above the layers, and the top layer; a layer more every `steps` optimizer steps (Howard and
    Ruder 2018, arXiv 1801.06146); what lies below the layers at last."""

    def __init__(self, model: nn.Module, steps: int):
        self.model, self.steps = model, steps
        names = [name for name, _ in model.named_parameters() if _in_body(name, model)]
        layers = sorted({layer for name in names if (layer := layer_of(name)) is not None})
        first = next((place for place, name in enumerate(names) if layer_of(name) is not None), 0)
        height: dict[int | None, int] = {layer: rank for rank, layer in enumerate(reversed(layers))}
        # after how many unfreezings each parameter trains
        self.waits = {name: height.get(layer_of(name), len(layers)) for name in names}
        self.waits |= {name: 0 for name in names[first:] if layer_of(name) is None}

    def let_all_train(self) -> None:
        """While the optimizer and the wrapper of several processes are made, which take what trains then for all that
        ever will."""
        self._apply(self.steps * len(self.waits))

    def frozen_at(self, step: int) -> set[str]:
        """What is frozen after `step` steps."""
        return {name for name, wait in self.waits.items() if wait > step // self.steps}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._apply(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0:
            self._apply(state.global_step)

    def _apply(self, step: int) -> None:
        frozen = self.frozen_at(step)
        for name, parameter in self.model.named_parameters():
            if name in self.waits:
                parameter.requires_grad_(name not in frozen)


def what_trains(model: nn.Module) -> dict[str, Any]:
    """Tensors and parameters that train, their share, and both by kind; of the parameters that there are."""
    kinds: dict[str, list[int]] = {}
    tensors = parameters = total = 0
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())  # ZeRO-3 leaves none of them here
        total += size
        row = kinds.setdefault(kind_of(name), [0, 0])
        row[1] += size
        if parameter.requires_grad:
            tensors, parameters = tensors + 1, parameters + size
            row[0] += size
    return {
        "tensors": tensors,
        "parameters": parameters,
        "of": total,
        "share": parameters / total,
        "by_kind": {kind: {"parameters": row[0], "of": row[1]} for kind, row in kinds.items()},
    }


def in_words(trains: dict[str, Any]) -> str:
    """What `what_trains` gives, in a line."""
    kinds = ", ".join(f"{kind} {row['parameters']:,} of {row['of']:,}" for kind, row in trains["by_kind"].items())
    return (
        f"{trains['tensors']} tensors, {trains['parameters']:,} of {trains['of']:,} parameters "
        f"({trains['share']:.1%}): {kinds}"
    )
