"""The certificate: dense model and mixture on the same inputs, every difference measured and written down."""

import json
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_moe.errors import SourceError

from .checkpoint import Checkpoint, read_json
from .classes import find_classes, find_family
from .compare import (
    RANDOM_LENGTHS,
    Batch,
    capture_feed_forward,
    compare_outputs,
    difference_of,
    generate_greedily,
    load_model,
    make_batches,
    run_model,
    unpadded,
)
from .families import Family

CERTIFICATE_NAME = "certificate.json"
FORMAT = 1

# Largest relative difference of the outputs that counts as the same function. In float32 both models are rounded,
# so if the dense one's own rounding (its distance from itself in float64) is large, twice that is the limit.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


def certify(
    dense: Checkpoint,
    moe: Checkpoint,
    *,
    texts: list[str] | None = None,
    tolerance: dict[str, float] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Measures how far the mixture `moe` is from the dense checkpoint it was made from.

    Both run in evaluation mode in float32 and float64, on `texts` (default: ten sentences that the package ships;
    left out, and said so, where the source has no tokenizer) and on random ids, with padding.

    Returns:
        The certificate, as it is written to `certificate.json`; `passed` is the verdict.

    Raises:
        SourceError: where `moe` is no mixture of `dense`'s family.
    """
    family = find_family(dense)
    dense_class, moe_class = find_classes(dense, family)
    _check_pair(dense, moe, family, moe_class)
    batches, text_note = make_batches(dense, texts, seed)
    tolerance = {**TOLERANCE, **(tolerance or {})}

    runs: dict[str, Any] = {}
    outputs64 = None
    for dtype in ("float64", "float32"):
        progress(f"comparing in {dtype}")
        dense_model = load_model(dense_class, dense, dtype)
        moe_model = load_model(moe_class, moe, dtype)
        dense_outputs = {batch.name: run_model(dense_model, batch) for batch in batches}
        moe_outputs = {batch.name: run_model(moe_model, batch) for batch in batches}
        outputs64 = outputs64 or dense_outputs
        rounding = max(compare_outputs(outputs64[b.name], dense_outputs[b.name], b)["max_rel"] for b in batches)
        limit = tolerance[dtype] if dtype == "float64" else max(tolerance[dtype], 2 * rounding)
        runs[dtype] = _verdict(dense_outputs, moe_outputs, batches, limit)
        if dtype == "float32":
            runs[dtype]["dense_rounding"] = rounding
            if dense_class.can_generate():
                progress("generating")
                runs[dtype]["greedy"] = _same_text(dense_model, moe_model, batches)
        if not runs[dtype]["passed"]:
            progress("looking for the layer that differs")
            runs[dtype]["bisect"] = bisect(dense_model, moe_model, family, batches[0], limit)

    recorded = (moe.config.get("upcycled_from") or {}).get("sha256")
    return {
        "format": FORMAT,
        "passed": all(run["passed"] for run in runs.values()),
        "dense": {
            "source": dense.source,
            "revision": dense.revision,
            "class": dense_class.__name__,
            "sha256": dense.sha256,
        },
        "moe": {"class": moe_class.__name__, "sha256": moe.sha256, "made_from_this_dense": recorded == dense.sha256},
        "inputs": {
            "text": text_note,
            "random": f"{len(RANDOM_LENGTHS)} sequences of ids, seed {seed}",
            "padding": True,
        },
        "float32": runs["float32"],
        "float64": runs["float64"],
        "versions": {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers", "safetensors")},
    }


def write_certificate(certificate: dict[str, Any], folder: Path) -> Path:
    """Writes `certificate.json` into `folder`."""
    file = folder / CERTIFICATE_NAME
    file.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    return file


def read_certificate(folder: Path) -> dict[str, Any] | None:
    """The certificate beside a checkpoint's weights, if there is one."""
    file = folder / CERTIFICATE_NAME
    return read_json(file) if file.is_file() else None


def explain(certificate: dict[str, Any]) -> str:
    """The verdict in one line."""
    parts = [f"{dtype} {certificate[dtype]['max_rel']:.1e}" for dtype in ("float32", "float64")]
    line = f"largest relative difference: {', '.join(parts)}"
    if greedy := certificate["float32"].get("greedy"):
        line += (
            f"; {greedy['new_tokens']} greedy tokens the same for {greedy['identical']} of {greedy['prompts']} prompts"
        )
    failed = next((certificate[d] for d in ("float64", "float32") if not certificate[d]["passed"]), None)
    if failed is None:
        return line
    return f"{line}; allowed {failed['tolerance']:.1e}; {failed['bisect']['summary']}"


def _check_pair(dense: Checkpoint, moe: Checkpoint, family: Family, moe_class: type[PreTrainedModel]) -> None:
    model_type, wanted = moe.config.get("model_type"), family.config_class.model_type
    if model_type != wanted:
        raise SourceError(
            f"{moe.path}: has model_type {model_type!r}, but a mixture of {dense.source} has {wanted!r}."
        )
    named = (moe.config.get("architectures") or ["no class"])[0]
    if named != moe_class.__name__:
        raise SourceError(f"{moe.path}: is a {named}, but a mixture of {dense.source} is a {moe_class.__name__}.")


def _same_text(dense_model: PreTrainedModel, moe_model: PreTrainedModel, batches: list[Batch]) -> dict[str, Any]:
    """Whether both continue every prompt by the same tokens. Reported, not judged: in float32 a near-tie may fall
    either way without the functions being different ones."""
    pairs = [
        (one, other)
        for batch in batches
        for one, other in zip(generate_greedily(dense_model, batch), generate_greedily(moe_model, batch), strict=True)
    ]
    same = sum(one == other for one, other in pairs)
    return {"prompts": len(pairs), "new_tokens": len(pairs[0][0]), "identical": same}


def _verdict(dense, moe, batches: list[Batch], limit: float) -> dict[str, Any]:
    compared = {batch.name: compare_outputs(dense[batch.name], moe[batch.name], batch) for batch in batches}
    worst = max(result["max_rel"] for result in compared.values())
    return {
        "passed": worst <= limit,
        "tolerance": limit,
        "max_abs": max(result["max_abs"] for result in compared.values()),
        "max_rel": worst,
        **compared,
    }


@torch.no_grad()
def bisect(dense: PreTrainedModel, moe: PreTrainedModel, family: Family, batch: Batch, limit: float) -> dict[str, Any]:
    """Where the two part: each mixture layer alone, on the inputs its dense twin sees; and the hidden states' trail.

    Returns:
        `layers`: for each layer, `hidden_state` (relative difference behind it) and, in mixture layers,
        `feed_forward` (of its mixture alone, given the dense inputs); `summary`: the verdict in words.
    """
    captured = capture_feed_forward(dense, family, batch)
    dense_states, moe_states = run_model(dense, batch), run_model(moe, batch)
    layers: list[dict[str, Any]] = []
    for index in range(dense.config.num_hidden_layers):
        name = f"hidden_states.{index + 1}"
        states = [unpadded(run[name], batch) for run in (dense_states, moe_states)]
        entry: dict[str, Any] = {"layer": index, "hidden_state": difference_of(*states)["max_rel"]}
        if index in moe.config.moe_layer_indices:
            x, y = captured[index]
            block = moe.base_model.get_submodule(f"{family.layer.format(layer=index)}.mlp")
            entry["feed_forward"] = difference_of(y.double(), block(x).double())["max_rel"]
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
