"""What a checkpoint or a plan is, as plain values: for `inspect`, `--dry-run` and `--json`."""

import math
from typing import Any

from hf_moe.errors import SourceError

from .certificate import explain, read_certificate
from .checkpoint import Checkpoint
from .families import FAMILIES
from .plan import Plan

# by the names of BERT, GPT-2, DistilBERT, Whisper
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "encoder_layers")


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Family, layers, parameters (total, and active for one token), experts and certificate of a checkpoint."""
    config = checkpoint.config
    moe_types = {family.config_class.model_type for family in FAMILIES.values()}
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    model_type = config.get("model_type")
    described = {
        "source": checkpoint.source,
        "family": str(model_type).removesuffix("_moe"),
        "class": (config.get("architectures") or [None])[0],
        "layers": next((config[name] for name in LAYER_COUNTS if name in config), None),
        "dtypes": sorted({info.dtype for info in checkpoint.tensors.values()}),
        "bytes": sum(info.nbytes for info in checkpoint.tensors.values()),
        "files": len(checkpoint.files),
        **_parameters(shapes, config.get("num_experts_per_tok")),
    }
    if model_type not in moe_types:
        described["convertible"] = model_type in FAMILIES
    else:
        certificate = _certificate(checkpoint)
        described |= {
            "num_experts": config.get("num_experts"),
            "num_experts_per_tok": config.get("num_experts_per_tok"),
            "moe_layers": config.get("moe_layers"),
            "upcycled_from": config.get("upcycled_from"),
            "certificate": certificate,
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
    if plan.problems or plan.config is None or plan.dense_class is None or plan.moe_class is None:
        return {"problems": [str(problem) for problem in plan.problems]}
    shapes = {tensor.name: tensor.shape for tensor in plan.tensors}
    return {
        "source": plan.recipe.base_model,
        "dense_class": plan.dense_class.__name__,
        "class": plan.moe_class.__name__,
        "num_experts": plan.config.num_experts,
        "num_experts_per_tok": plan.config.num_experts_per_tok,
        "moe_layers": plan.config.moe_layers,
        "exactness": plan.exactness,
        **_parameters(shapes, plan.config.num_experts_per_tok),
        "bytes": plan.nbytes,
        "files": len(plan.shards),
        "dropped": plan.dropped,
        "notes": list(plan.notes),
        "problems": [],
    }


def _parameters(shapes: dict[str, tuple[int, ...]], top_k: int | None) -> dict[str, int]:
    """Total, and those that one token uses: of each expert tensor, `top_k` experts."""
    total = active = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        total += size
        active += size // shape[0] * top_k if ".experts." in name and top_k and size else size
    return {"parameters": total, "active_parameters": active}
