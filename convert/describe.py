"""What a checkpoint or a plan is, as plain values: for `inspect`, `--dry-run` and `--json`."""

import dataclasses
import math
from typing import Any

from hf_moe.errors import SourceError
from hf_moe.modeling.configuration_moe import MoeConfigMixin

from .certificate import explain, read_certificate
from .checkpoint import Checkpoint
from .families import FAMILIES
from .mixture import is_mixture, open_mixture
from .plan import Plan
from .writer import split

# By the names of BERT, GPT-2, DistilBERT, GPT-Neo, Whisper
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers")


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, layers, parameters (total, and active for one token), experts and certificate of a checkpoint."""
    config = checkpoint.config
    families = {family.config_class.model_type: family.model_type for family in FAMILIES.values()}
    mixture = open_mixture(checkpoint) if is_mixture(config) else None
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    model_type = config.get("model_type")
    used = (mixture.num_experts, _visited(config, mixture.top_k)) if mixture else ()
    described = {
        "source": checkpoint.source,
        "family": families.get(str(model_type), model_type),
        "class": (config.get("architectures") or [None])[0],
        "layers": next((config[name] for name in LAYER_COUNTS if name in config), None),
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "files": len(checkpoint.files),
        **_parameters(shapes, *used),
    }
    if mixture is None:
        described["convertible"] = model_type in FAMILIES
    else:
        described |= {
            "num_experts": mixture.num_experts,
            "num_experts_per_tok": mixture.top_k,
            "norm_topk_prob": mixture.norm_topk_prob,
            "moe_layers": list(mixture.layers),
            "expert_width": mixture.width,
            "expert_rank": mixture.rank or None,
            "shared_expert_width": mixture.shared_width or None,
            "upcycled_from": config.get("upcycled_from"),
            "fused_from": config.get("fused_from"),
            "certificate": _certificate(checkpoint),
        }
    return described


def _certificate(checkpoint: Checkpoint) -> dict[str, Any] | None:
    certificate = read_certificate(checkpoint.path)
    if certificate is None:
        return None
    try:
        return {
            "passed": certificate["passed"],
            "summary": explain(certificate),
            "weights_unchanged": certificate["moe"]["sha256"] == checkpoint.sha256,
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise SourceError(f"{checkpoint.path}: certificate.json is none of ours (no {error}).") from error


def describe_plan(plan: Plan) -> dict[str, Any]:
    """What a conversion would write, and whether it preserves the function; only `problems` where it can't be done."""
    if plan.problems:
        return {"problems": [str(problem) for problem in plan.problems]}
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    return {
        "source": plan.recipe.base_model,
        "dense_class": plan.dense_class.__name__,
        "class": plan.moe_class.__name__,
        "target": plan.target.kind,
        "num_experts": plan.recipe.num_experts,
        "num_experts_per_tok": plan.recipe.num_experts_per_tok,
        "moe_layers": sorted(plan.networks),
        "exactness": str(plan.exactness),
        "expected_error": plan.exactness.expected_error,
        **_parameters(
            shapes, plan.recipe.num_experts, _visited(dataclasses.asdict(plan.recipe), plan.recipe.num_experts_per_tok)
        ),
        "bytes": plan.nbytes,
        "files": len(split(plan.tensors, plan.recipe.max_shard_size)),
        "dropped": plan.dropped,
        "notes": list(plan.notes),
        "problems": [],
    }


def _visited(config: dict[str, Any], top_k: int) -> float | None:
    """How many experts a token visits, on average; None where that is for the router to say."""
    router_type = config.get("router_type")
    if router_type == "expert_choice":
        return config.get("router_capacity_factor", MoeConfigMixin.router_capacity_factor)
    return None if router_type == "top_p" else top_k


def _parameters(
    shapes: dict[str, tuple[int, ...]], num_experts: int = 1, visited: float | None = 1
) -> dict[str, int | None]:
    """Total, and those that one token uses: `visited` of every `num_experts` experts, stacked or each by itself."""
    experts = others = 0
    for name, shape in shapes.items():
        shared = len(shape) > 1 and shape[0] == 1 < num_experts  # by experts of low rank
        if ".experts." in name and not shared:
            experts += math.prod(shape)
        else:
            others += math.prod(shape)
    active = None if visited is None else others + round(experts * visited / num_experts)
    return {"parameters": others + experts, "active_parameters": active}
