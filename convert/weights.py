"""The mixture's weights held against the dense ones, tensor by tensor: what no finite set of inputs could show."""

from typing import Any

import torch

from hf_moe.errors import HfMoeError, SourceError
from hf_moe.recipe import UpcycleRecipe

from .checkpoint import Checkpoint
from .mixture import NATIVE, open_mixture
from .names import tensors_of
from .plan import Plan, TensorPlan, plan_upcycle
from .stream import pieces

NAMED = 20  # of the tensors that differ


def plan_of(dense: Checkpoint, moe: Checkpoint) -> Plan:
    """The plan by which `moe` was made of `dense`: of the recipe in its configuration, or else by copying.

    Raises:
        SourceError: where `moe` is no mixture of `dense`: another family, class, size, or tensors that do not fit.
    """
    if moe.config.get("fused_from"):
        raise SourceError(
            f"{moe.path}: is fused from several models, which a comparison with one can't judge; give the recipe it "
            "was fused by instead of the dense checkpoint."
        )
    recorded = moe.config.get("upcycled_from")
    recipe = recorded.get("recipe") if isinstance(recorded, dict) else None
    values = {
        **(recipe if isinstance(recipe, dict) else {}),
        "base_model": dense.source,
        **(_native_facts(moe) if moe.config.get("model_type") in NATIVE else _our_facts(moe)),
        "allow_nonfinite": True,
    }
    try:
        plan = plan_upcycle(dense, UpcycleRecipe.from_dict(values, where="config.json"))
        plan.check()
    except HfMoeError as error:
        raise SourceError(f"{moe.path}: can't be a mixture of {dense.source}: {error}") from error
    check_mixture(dense, moe, plan)
    return plan


def check_mixture(dense: Checkpoint, moe: Checkpoint, plan: Plan) -> None:
    """Raises SourceError where `moe` has not the class and the tensors that `plan` makes of `dense`."""
    _check_class(dense, moe, plan)
    wanted, tied = tensors_of(plan.moe_class, plan.config)
    for tensor in plan.tensors:
        name = tensor.name
        if tensor.layer < 0 and name not in wanted:
            continue  # another head's, which came along
        if name not in moe.tensors and name not in tied:
            raise SourceError(f"{moe.path}: tensor {name!r} is missing, which a mixture of {dense.source} has.")
        if name in moe.tensors and moe.tensors[name].shape != tensor.shape:
            shapes = f"{list(moe.tensors[name].shape)}, not {list(tensor.shape)}"
            raise SourceError(f"{moe.path}: tensor {name!r} has shape {shapes} as a mixture of {dense.source} has.")


def _our_facts(moe: Checkpoint) -> dict[str, Any]:
    layers = moe.config.get("moe_layers")
    return {
        "target": "hf_moe",
        "num_experts": moe.config.get("num_experts", 8),
        "num_experts_per_tok": moe.config.get("num_experts_per_tok", 2),
        "norm_topk_prob": moe.config.get("norm_topk_prob", True),
        "router_type": moe.config.get("router_type", "softmax"),
        "expert_rank": moe.config.get("expert_rank", 0),
        "moe_layers": "all" if layers is None else layers,
    }


def _native_facts(moe: Checkpoint) -> dict[str, Any]:
    mixture = open_mixture(moe)
    return {
        "target": "native",
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": mixture.norm_topk_prob,
        "moe_layers": list(mixture.layers),
    }


def _check_class(dense: Checkpoint, moe: Checkpoint, plan: Plan) -> None:
    model_type, wanted = moe.config.get("model_type"), plan.config.model_type
    if model_type != wanted:
        raise SourceError(f"{moe.path}: has model_type {model_type!r}, a mixture of {dense.source} has {wanted!r}.")
    named = (moe.config.get("architectures") or ["no class"])[0]
    if named != plan.moe_class.__name__:
        raise SourceError(f"{moe.path}: is a {named}, but a mixture of {dense.source} is a {plan.moe_class.__name__}.")


def compare_weights(plan: Plan, moe: Checkpoint) -> dict[str, Any]:
    """Every tensor of `moe` but its routers against what `plan` makes of the dense one, bit for bit.

    Returns:
        `identical`: whether all are; `compared`: how many; `different`: names of the first that are not.
    """
    planned = [tensor for tensor in plan.tensors if tensor.method != "router" and tensor.name in moe.tensors]
    different = [tensor.name for tensor in planned if not _same(tensor, plan, moe)]
    return {"identical": not different, "compared": len(planned), "different": different[:NAMED]}


def _same(tensor: TensorPlan, plan: Plan, moe: Checkpoint) -> bool:
    """Whether `moe` has the values planned; a wider dtype may hold them."""
    position, actual = 0, moe.read(tensor.name).view(-1)
    for piece in pieces(tensor, plan):
        planned = piece.reshape(-1)
        if not _equal(planned, actual[position : position + len(planned)]):
            return False
        position += len(planned)
    return position == len(actual)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype == other.dtype:
        return torch.equal(one.contiguous().view(torch.uint8), other.view(torch.uint8))
    wide = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.to(wide), other.to(wide))
