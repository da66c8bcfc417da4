"""The certificate: dense model and mixture on the same inputs, every difference measured and written down."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel

from hf_moe.errors import SourceError

from .checkpoint import Checkpoint, read_json
from .families import FAMILIES, Family
from .plan import find_classes, find_family
from .quiet import quiet

CERTIFICATE_NAME = "certificate.json"
FORMAT = 1
MAX_TOKENS = 128  # of one text
RANDOM_LENGTHS = (64, 48, 17, 3)

# Largest relative difference of the outputs that counts as the same function. In float32 the dense model's own
# rounding (its distance from itself in float64) may be larger; then that is the limit.
TOLERANCE = {"float32": 1e-6, "float64": 1e-12}


@dataclass(frozen=True)
class Batch:
    """Token ids and attention mask (B, S), padded on the right."""

    name: str
    input_ids: torch.Tensor
    attention_mask: torch.Tensor


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
    batches, text_note = _batches(dense, texts, seed)
    tolerance = {**TOLERANCE, **(tolerance or {})}

    runs: dict[str, Any] = {}
    outputs64 = None
    for dtype in ("float64", "float32"):
        progress(f"comparing in {dtype}")
        dense_model = _load(dense_class, dense, dtype)
        moe_model = _load(moe_class, moe, dtype)
        dense_outputs = {batch.name: _run(dense_model, batch) for batch in batches}
        moe_outputs = {batch.name: _run(moe_model, batch) for batch in batches}
        outputs64 = outputs64 or dense_outputs
        rounding = max(_compare(outputs64[b.name], dense_outputs[b.name], b)["max_rel"] for b in batches)
        limit = tolerance[dtype] if dtype == "float64" else max(tolerance[dtype], rounding)
        runs[dtype] = _verdict(dense_outputs, moe_outputs, batches, limit)
        if dtype == "float32":
            runs[dtype]["dense_rounding"] = rounding
        if not runs[dtype]["passed"]:
            progress("looking for the layer that differs")
            runs[dtype]["bisect"] = bisect(dense_model, moe_model, family, batches[0], limit)

    recorded = (moe.config.get("upcycled_from") or {}).get("sha256")
    return {
        "format": FORMAT,
        "passed": all(run["passed"] for run in runs.values()),
        "dense": {"source": dense.source, "revision": dense.revision, "class": dense_class.__name__, "sha256": dense.sha256},
        "moe": {"class": moe_class.__name__, "sha256": moe.sha256, "made_from_this_dense": recorded == dense.sha256},
        "inputs": {"text": text_note, "random": f"{len(RANDOM_LENGTHS)} sequences of ids, seed {seed}", "padding": True},
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
    failed = next((certificate[d] for d in ("float64", "float32") if not certificate[d]["passed"]), None)
    if failed is None:
        return line
    return f"{line}; allowed {failed['tolerance']:.1e}; {failed['bisect']['summary']}"


def _check_pair(dense: Checkpoint, moe: Checkpoint, family: Family, moe_class: type[PreTrainedModel]) -> None:
    model_type, wanted = moe.config.get("model_type"), family.config_class.model_type
    if model_type != wanted:
        raise SourceError(f"{moe.path}: has model_type {model_type!r}, but a mixture of {dense.source} has {wanted!r}.")
    named = (moe.config.get("architectures") or ["no class"])[0]
    if named != moe_class.__name__:
        raise SourceError(f"{moe.path}: is a {named}, but a mixture of {dense.source} is a {moe_class.__name__}.")


def _load(model_class: type[PreTrainedModel], checkpoint: Checkpoint, dtype: str) -> PreTrainedModel:
    with quiet():
        model = model_class.from_pretrained(checkpoint.path, dtype=getattr(torch, dtype), local_files_only=True)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = 0  # some heads refuse a batch without one; the mask is what hides padding
    return model.eval()


def sample_texts() -> list[str]:
    """Ten sentences of the public domain, of 7 to 60 words."""
    return files("hf_moe.convert").joinpath("sample.txt").read_text(encoding="utf-8").splitlines()


def _batches(dense: Checkpoint, texts: list[str] | None, seed: int) -> tuple[list[Batch], str]:
    longest = min(MAX_TOKENS, dense.config.get("max_position_embeddings") or dense.config.get("n_positions") or MAX_TOKENS)
    generator = torch.Generator().manual_seed(seed)
    random_ids = [
        torch.randint(0, dense.config["vocab_size"], (min(n, longest),), generator=generator).tolist()
        for n in RANDOM_LENGTHS
    ]
    batches = [_pad("random", random_ids)]
    if not dense.has_tokenizer:
        return batches, "none: the source has no tokenizer"
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(dense.path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        return batches, f"none: the source's tokenizer does not load ({type(error).__name__})"
    texts = texts or sample_texts()
    ids = [tokenizer(text, truncation=True, max_length=longest)["input_ids"] for text in texts]
    ids = [row for row in ids if row and max(row) < dense.config["vocab_size"]]
    if not ids:
        return batches, "none: the tokenizer's ids do not fit the model's vocabulary"
    return [_pad("text", ids), *batches], f"{len(ids)} texts, {sum(map(len, ids))} tokens"


def _pad(name: str, rows: list[list[int]]) -> Batch:
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch(name, ids, mask)


@torch.no_grad()
def _run(model: PreTrainedModel, batch: Batch) -> dict[str, torch.Tensor]:
    """Named float outputs, hidden states as `hidden_states.N`, and the loss on labels made from the inputs."""
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: value.unsqueeze(1) for name, value in inputs.items()}
    outputs = model(**inputs, output_hidden_states=True)
    found = {f"hidden_states.{i}": state for i, state in enumerate(outputs.hidden_states)}
    found |= {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
    return {name: value.to(torch.float64) for name, value in found.items() if value.is_floating_point()}


def _compare(dense: dict[str, torch.Tensor], moe: dict[str, torch.Tensor], batch: Batch) -> dict[str, Any]:
    """Differences of each output where the input is no padding; `max_*` over the outputs, hidden states apart."""
    outputs: dict[str, dict[str, float]] = {}
    hidden: list[dict[str, float]] = []
    for name, value in dense.items():
        difference = _difference(_unpadded(value, batch), _unpadded(moe[name], batch))
        if name.startswith("hidden_states."):
            hidden.append(difference)
        else:
            outputs[name] = difference
    result: dict[str, Any] = {
        "max_abs": max(d["max_abs"] for d in outputs.values()),
        "max_rel": max(d["max_rel"] for d in outputs.values()),
        "outputs": outputs,
        "hidden_states": hidden,
    }
    logits = next((name for name in ("logits", "prediction_logits") if name in dense), None)
    if logits is not None and dense[logits].shape[-1] > 1:
        result |= _likelihoods(dense[logits], moe[logits], batch)
    return result


def _unpadded(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    if value.shape[:2] == batch.attention_mask.shape:
        return value[batch.attention_mask.bool()]
    return value


def _difference(dense: torch.Tensor, moe: torch.Tensor) -> dict[str, float]:
    """Largest absolute difference, and the same relative to the largest dense value. NaN counts as infinite."""
    gap = (dense - moe).abs().nan_to_num(nan=torch.inf).max().item() if dense.numel() else 0.0
    scale = dense.abs().max().item() if dense.numel() else 1.0
    return {"max_abs": gap, "max_rel": gap / scale if scale > 0 else gap}


def _likelihoods(dense: torch.Tensor, moe: torch.Tensor, batch: Batch) -> dict[str, Any]:
    """Mean KL(dense ‖ moe) in nats, and both losses: on the tokens themselves where the logits are over the
    vocabulary of each token (shifted nowhere: any fixed labels will do), else on the dense model's own choice."""
    log_p, log_q = (_unpadded(logits, batch).log_softmax(-1).flatten(0, -2) for logits in (dense, moe))
    labels = log_p.argmax(-1)
    if dense.shape[:2] == batch.input_ids.shape and dense.shape[-1] > int(batch.input_ids.max()):
        labels = batch.input_ids[batch.attention_mask.bool()]
    losses = {name: functional.nll_loss(log, labels).item() for name, log in (("dense", log_p), ("moe", log_q))}
    kl = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True).item()
    return {"kl": kl, "loss": {**losses, "difference": losses["moe"] - losses["dense"]}}


def _verdict(dense, moe, batches: list[Batch], limit: float) -> dict[str, Any]:
    compared = {batch.name: _compare(dense[batch.name], moe[batch.name], batch) for batch in batches}
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
    captured = _capture(dense, family, batch)
    dense_states, moe_states = _run(dense, batch), _run(moe, batch)
    layers: list[dict[str, Any]] = []
    for index in range(dense.config.num_hidden_layers):
        name = f"hidden_states.{index + 1}"
        states = [_unpadded(run[name], batch) for run in (dense_states, moe_states)]
        entry: dict[str, Any] = {"layer": index, "hidden_state": _difference(*states)["max_rel"]}
        if index in moe.config.moe_layer_indices:
            x, y = captured[index]
            block = moe.base_model.get_submodule(f"{family.layer.format(layer=index)}.mlp")
            entry["feed_forward"] = _difference(y.double(), block(x).double())["max_rel"]
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


def _capture(dense: PreTrainedModel, family: Family, batch: Batch) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
    """Input of `up` and output of `down` in each layer of the dense model."""
    seen: dict[str, torch.Tensor] = {}
    with _hooks(dense, family, seen):
        _run(dense, batch)
    return {i: (seen[f"{i}.in"], seen[f"{i}.out"]) for i in range(dense.config.num_hidden_layers)}


class _hooks:
    """Forward hooks on every layer's feed-forward network, removed at the end."""

    def __init__(self, dense: PreTrainedModel, family: Family, seen: dict[str, torch.Tensor]):
        self.handles = list(self._register(dense, family, seen))

    @staticmethod
    def _register(dense, family, seen) -> Iterator[Any]:
        for index in range(dense.config.num_hidden_layers):
            layer = dense.base_model.get_submodule(family.layer.format(layer=index))

            def keep_in(module, args, index=index):
                seen[f"{index}.in"] = args[0]

            def keep_out(module, args, output, index=index):
                seen[f"{index}.out"] = output

            yield layer.get_submodule(family.up).register_forward_pre_hook(keep_in)
            yield layer.get_submodule(family.down).register_forward_hook(keep_out)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()
