"""The mixture's weights held against the dense ones, tensor by tensor: what no finite set of inputs could show."""

from typing import Any

import torch

from hf_moe.errors import HfMoeError, SourceError
from hf_moe.recipe import UpcycleRecipe

from .checkpoint import Checkpoint
from .names import tensors_of
from .plan import Plan, plan_upcycle
from .stream import METHODS

NAMED = 20  # of the tensors that differ


def plan_of(dense: Checkpoint, moe: Checkpoint) -> Plan:
    """The plan by which `moe` would be made of copies of `dense`.

    Raises:
        SourceError: where `moe` is no mixture of `dense`: another family, class, size, or tensors that do not fit.
    """
    config = moe.config
    layers = config.get("moe_layers")
    values = {
        "base_model": dense.source,
        "num_experts": config.get("num_experts", 8),
        "num_experts_per_tok": config.get("num_experts_per_tok", 2),
        "moe_layers": "all" if layers is None else layers,
        "allow_nonfinite": True,
    }
    try:
        plan = plan_upcycle(dense, UpcycleRecipe.from_dict(values, where="config.json"))
        plan.check()
    except HfMoeError as error:
        raise SourceError(f"{moe.path}: can't be a mixture of {dense.source}: {error}") from error
    assert plan.config is not None  # as in every plan without problems
    assert plan.moe_class is not None
    _check_class(dense, moe, plan)
    target, tied = tensors_of(plan.moe_class, plan.config)
    planned = {tensor.name for tensor in plan.tensors}
    for name, tensor in target.items():
        if name not in moe.tensors and name in planned - tied:
            raise SourceError(f"{moe.path}: tensor {name!r} is missing, which a mixture of {dense.source} has.")
        if name in moe.tensors and moe.tensors[name].shape != tuple(tensor.shape):
            shapes = f"{list(moe.tensors[name].shape)}, not {list(tensor.shape)}"
            raise SourceError(f"{moe.path}: tensor {name!r} has shape {shapes} as a mixture of {dense.source} has.")
    return plan


def _check_class(dense: Checkpoint, moe: Checkpoint, plan: Plan) -> None:
    assert plan.config is not None
    assert plan.moe_class is not None
    model_type, wanted = moe.config.get("model_type"), plan.config.model_type
    if model_type != wanted:
        raise SourceError(f"{moe.path}: has model_type {model_type!r}, a mixture of {dense.source} has {wanted!r}.")
    named = (moe.config.get("architectures") or ["no class"])[0]
    if named != plan.moe_class.__name__:
        raise SourceError(f"{moe.path}: is a {named}, but a mixture of {dense.source} is a {plan.moe_class.__name__}.")


def compare_weights(plan: Plan, dense: Checkpoint, moe: Checkpoint) -> dict[str, Any]:
    """Every tensor of `moe` but its routers against what `plan` makes of `dense`, bit for bit.

    Returns:
        `identical`: whether all are; `compared`: how many; `different`: names of the first that are not.
    """
    planned = [tensor for tensor in plan.tensors if tensor.method != "router" and tensor.name in moe.tensors]
    different = []
    for tensor in planned:
        actual = moe.read(tensor.name)
        parts = METHODS[tensor.method](tensor, plan, dense)
        actual_parts = actual.unbind() if tensor.method == "experts" else [actual]
        if not all(_same(one, other) for one, other in zip(parts, actual_parts, strict=True)):
            different.append(tensor.name)
    return {"identical": not different, "compared": len(planned), "different": different[:NAMED]}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """The same values; a wider dtype may hold them."""
    if one.dtype == other.dtype:
        return torch.equal(*(value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)))
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
