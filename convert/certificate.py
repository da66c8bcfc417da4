"""The certificate: dense model and mixture on the same inputs, every difference measured and written down."""

import json
import math
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .calibrate import read_deals
from .checkpoint import Checkpoint, read_json
from .classes import body_of
from .compare import (
    Batch,
    capture_feed_forward,
    compare_outputs,
    difference_of,
    generate_greedily,
    load_dense,
    load_model,
    make_batches,
    make_measurable,
    run_model,
)
from .manifest import update_manifest
from .plan import Plan
from .scheme import EXACT, NOT_PRESERVING
from .weights import compare_weights, plan_of

CERTIFICATE_NAME = "certificate.json"
DIFFERENCES = ("max_abs", "max_rel", "max_rel_by_column")
FORMAT = 1

# What decides: in float64, with digits to spare, each column by its own size; in float32 all by the largest value.
JUDGED = {"float32": "max_rel", "float64": "max_rel_by_column"}

# Largest relative difference of the outputs that counts as the same function. In float32 both models are rounded,
# so if the dense one's own rounding (its distance from itself in float64) is large, twice that is the limit.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def certify(
    dense: Checkpoint,
    moe: Checkpoint,
    *,
    plan: Plan | None = None,
    texts: list[str] | None = None,
    tolerance: dict[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measures how far the mixture `moe` is from the dense checkpoint it was made from.

    Their weights are compared bit for bit, routers apart. Then both run in evaluation mode in float32 and float64, on
    `texts` (default: ten sentences that the package ships; left out, and said so, where the model reads none or the
    source has no tokenizer) and on random inputs of the model's kind, with padding where it has a mask. Where
    `plan` fuses other networks than the dense one's, the weights decide, and outputs are measured only.

    Args:
        dense, moe: the checkpoints.
        plan: by which `moe` was made of `dense`; default: the one that its configuration tells of.
        texts: what to run on beside random inputs.
        tolerance: dtype -> largest relative difference that passes, instead of `TOLERANCE`; then differing weights
            are no failure by themselves.
        seed: of the random inputs.
        progress: is told each stage.

    Returns:
        The certificate, as it is written to `certificate.json`; `passed` is the verdict.

    Raises:
        SourceError: where `moe` is no mixture of `dense`, or one of them does not load.
    """
    if plan is None:
        plan = plan_of(dense, moe)
        read_deals(plan, moe)
    wants_copies = tolerance is None
    judged = not plan.donors or plan.exactness.kind == EXACT
    progress("comparing weights")
    weights = compare_weights(plan, moe)
    tolerance = {**TOLERANCE, **(tolerance or {})}

    runs: dict[str, Any] = {}
    batches: list[Batch] = []
    text_note = ""
    exact: dict[str, Any] = {}
    for dtype in ("float64", "float32"):
        progress(f"comparing in {dtype}")
        dense_model = load_dense(plan.dense_class, plan.family, dense, dtype, rounded_to=plan.recipe.dtype)
        moe_model = load_model(plan.moe_class, moe, dtype)
        if plan.target.kind == "native":
            make_measurable(moe_model, _routers(plan))
        if not batches:
            batches, text_note = make_batches(dense, dense_model.config, plan.family.inputs, texts, seed)
        dense_outputs = {batch.name: run_model(dense_model, batch) for batch in batches}
        moe_outputs = {batch.name: run_model(moe_model, batch) for batch in batches}
        limit = tolerance[dtype]
        if dtype == "float64":
            exact = dense_outputs
        else:
            rounding = max(compare_outputs(exact[b.name], dense_outputs[b.name], b)["max_rel"] for b in batches)
            limit = max(limit, 2 * rounding)
        runs[dtype] = _verdict(dense_outputs, moe_outputs, batches, JUDGED[dtype], limit)
        if dtype == "float64" and plan.target.kind == "native":
            runs[dtype]["gates"] = "computed in float64; the class itself rounds them to float32"
        if dtype == "float32":
            runs[dtype]["dense_rounding"] = rounding
            if plan.dense_class.can_generate():
                progress("generating")
                runs[dtype]["greedy"] = _same_text(dense_model, moe_model, batches)
        if judged and not runs[dtype]["passed"]:
            progress("looking for the layer that differs")
            runs[dtype]["bisect"] = bisect(dense_model, moe_model, plan, batches[0], limit, JUDGED[dtype])

    recorded = moe.config.get("upcycled_from")
    return without_nan(
        {
            "format": FORMAT,
            "passed": (weights["identical"] or not wants_copies)
            and (not judged or all(run["passed"] for run in runs.values())),
            "judged": judged,
            "start": str(plan.exactness),
            "dense": {
                "source": dense.source,
                "revision": dense.revision,
                "class": plan.dense_class.__name__,
                "sha256": dense.sha256,
            },
            "moe": {
                "class": plan.moe_class.__name__,
                "sha256": moe.sha256,
                "made_from_this_dense": isinstance(recorded, dict) and recorded.get("sha256") == dense.sha256,
            },
            "weights": weights,
            "inputs": {
                "text": text_note,
                "random": f"{len(batches[-1].inputs[plan.family.inputs])} rows of {plan.family.inputs}, seed {seed}",
                "padding": any(batch.is_padded for batch in batches),
            },
            "float32": runs["float32"],
            "float64": runs["float64"],
            "versions": {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers", "safetensors")},
        }
    )


def without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity; a KL divergence or a loss can be either."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_certificate(certificate: dict[str, Any], folder: Path) -> Path:
    """Writes `certificate.json` into `folder`."""
    file = folder / CERTIFICATE_NAME
    temporary = folder / f".{CERTIFICATE_NAME}"
    temporary.write_text(json.dumps(certificate, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(file)
    update_manifest(folder, file)
    return file


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The certificate beside a checkpoint's weights, if there is one."""
    file = folder / CERTIFICATE_NAME
    return read_json(file) if file.is_file() else None


def explain(certificate: dict[str, Any]) -> str:
    """The verdict in one line."""
    parts = [f"{dtype} {certificate[dtype]['max_rel']:.1e}" for dtype in ("float32", "float64")]
    weights, judged = certificate["weights"], certificate.get("judged", True)
    keeps = judged and not certificate.get("start", EXACT).startswith(NOT_PRESERVING)
    line = f"largest relative difference{'' if judged else ' from the base'}: {', '.join(parts)}"
    if weights["identical"]:
        wanted = "the dense ones" if keeps else "as planned"
        line = f"all {weights['compared']} tensors but the routers are {wanted}; {line}"
    else:
        line = f"{line}; {weights['different'][0]!r} is not {'the dense one' if keeps else 'as planned'}"
    if greedy := certificate["float32"].get("greedy"):
        same = f"{greedy['identical']} of {greedy['prompts']} prompts"
        line += f"; {greedy['new_tokens']} greedy tokens the same for {same}"
    dtype = next((dtype for dtype in ("float64", "float32") if not certificate[dtype]["passed"]), None)
    if dtype is None or not judged:
        return line
    failed = certificate[dtype]
    measured = f"{failed[JUDGED[dtype]]:.1e} in {dtype}, where {failed['tolerance']:.1e} is allowed"
    return f"{line}; {measured}; {failed['bisect']['summary']}"


def _routers(plan: Plan) -> list[str]:
    """The routers' names in the body of a native model."""
    router = plan.target.loaded.router.format(block=plan.target.block).removesuffix(".weight")
    return [f"{plan.family.layer.format(layer=layer)}.{router}" for layer in plan.networks]


def _same_text(dense_model: PreTrainedModel, moe_model: PreTrainedModel, batches: list[Batch]) -> dict[str, Any]:
    """Whether both continue every prompt by the same tokens. Reported, not judged: in float32 a near-tie may fall
    either way without the functions being different ones."""
    pairs = [
        (one, other)
        for batch in batches
        for one, other in zip(generate_greedily(dense_model, batch), generate_greedily(moe_model, batch), strict=True)
    ]
    same = sum(one == other for one, other in pairs)
    return {"prompts": len(pairs), "new_tokens": len(pairs[0][0]) if pairs else 0, "identical": same}


def _verdict(dense, moe, batches: list[Batch], judged: str, limit: float) -> dict[str, Any]:
    compared = {batch.name: compare_outputs(dense[batch.name], moe[batch.name], batch) for batch in batches}
    worst = {key: max(result[key] for result in compared.values()) for key in DIFFERENCES}
    return {"passed": worst[judged] <= limit, "tolerance": limit, **worst, **compared}


@torch.no_grad()
def bisect(
    dense: PreTrainedModel, moe: PreTrainedModel, plan: Plan, batch: Batch, limit: float, judged: str
) -> dict[str, Any]:
    """Where the two part: each mixture layer alone, on the inputs its dense twin sees; and the hidden states' trail.

    Returns:
        `layers`: for each layer, `hidden_state` (relative difference behind it) and, in mixture layers,
        `feed_forward` (of its mixture alone, given the dense inputs); `summary`: the verdict in words.
    """
    captured = capture_feed_forward(dense, plan.family, batch)
    dense_states, moe_states = run_model(dense, batch), run_model(moe, batch)
    layers: list[dict[str, Any]] = []
    for index in range(dense.config.num_hidden_layers):
        name = f"hidden_states.{index + 1}"
        difference = difference_of(dense_states[name], moe_states[name])
        entry: dict[str, Any] = {"layer": index, "hidden_state": difference[judged]}
        if index in plan.networks:
            x, y = captured[index]
            block = body_of(plan.family, moe).get_submodule(
                f"{plan.family.layer.format(layer=index)}.{plan.target.block}"
            )
            entry["feed_forward"] = difference_of(y.double(), block(x[None])[0].double())[judged]
        layers.append(entry)
    return {"summary": _summary(layers, limit), "layers": layers}


def _summary(layers: list[dict[str, Any]], limit: float) -> str:
    wrong = [entry["layer"] for entry in layers if entry.get("feed_forward", 0.0) > limit]
    if wrong:
        return f"the experts of layer {wrong[0]} are not its dense network" + (
            f" (nor those of layers {', '.join(map(str, wrong[1:]))})" if wrong[1:] else ""
        )
    first = next((entry["layer"] for entry in layers if entry["hidden_state"] > limit), None)
    if first is None:
        return "every layer agrees: the difference is behind the last one"
    return f"layer {first} differs outside its feed-forward network"
