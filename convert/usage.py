"""A model on text: what it costs in loss, and which experts the tokens are sent to.

Running a model needs its memory; everything else here is bounded by `ROWS` texts at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hf_moe.errors import UsageError
from hf_moe.routing.hooks import attach, experts_of, removing

from .checkpoint import Checkpoint
from .compare import Batch, load_model, pad, run_model, token_ids
from .headers import FLOATS
from .texts import load_tokenizer, read_texts

ROWS = 4
MASKED = 7  # of a masked language model's tokens every 7th is masked, the second of a text first
IGNORED = -100


@dataclass(frozen=True)
class Text:
    """Token ids in batches, and the id that hides one from a masked language model (None: there is none)."""

    batches: tuple[Batch, ...]
    mask_id: int | None
    note: str


def open_text(file: Path, checkpoint: Checkpoint, config: Any) -> Text:
    """The lines of `file` as the checkpoint's tokenizer reads them; errors as in `read_texts`, or where it does not
    work."""
    ids, note = token_ids(checkpoint, config, read_texts(file))
    if not ids:
        raise UsageError(f"{checkpoint.path}: can't read {file}: {note.removeprefix('none: ')}.")
    batches = [pad("text", ids[start : start + ROWS]) for start in range(0, len(ids), ROWS)]
    return Text(tuple(batches), load_tokenizer(checkpoint).mask_token_id, note)


@dataclass
class Usage:
    """What the mixtures did, by layer.

    Args:
        counts: (E,), tokens sent to each expert.
        norms: (E,), mean over these of gate times norm of the expert's output.
        gates: mean sum of a token's gates.
        shared_gates: mean factor of the shared expert, where a gate makes it.
    """

    counts: dict[int, torch.Tensor] = field(default_factory=dict)
    norms: dict[int, torch.Tensor] = field(default_factory=dict)
    gates: dict[int, float] = field(default_factory=dict)
    shared_gates: dict[int, float] = field(default_factory=dict)


@dataclass
class Quality:
    """How well a model does on a text.

    Args:
        kind: "next token", "masked token", or "outputs": of a model without a loss, only kept for comparison.
        loss: mean negative log-likelihood in nats.
        tokens: how many it was taken over.
        outputs: of each batch, what `run_model` gave.
    """

    kind: str
    loss: float | None = None
    tokens: int = 0
    outputs: list[dict[str, torch.Tensor]] = field(default_factory=list)


def load_for_text(model_class: type[PreTrainedModel], checkpoint: Checkpoint) -> PreTrainedModel:
    """The model, in bfloat16 where it is stored so, else in float32."""
    held = {info.dtype for info in checkpoint.tensors.values() if info.dtype in FLOATS}
    return load_model(model_class, checkpoint, "bfloat16" if held == {"BF16"} else "float32")


def quality_of(model: PreTrainedModel, text: Text) -> Quality:
    """Loss on the next token where the model generates, on hidden ones where it has logits over the vocabulary."""
    if model.get_output_embeddings() is None:
        return Quality("outputs", outputs=[run_model(model, batch, hidden_states=False) for batch in text.batches])
    total, quality = 0.0, Quality("next token" if model.can_generate() else "masked token")
    for batch in text.batches:
        shown, labels = _next(batch) if model.can_generate() else _hidden(batch, text.mask_id)
        outputs = run_model(model, shown, hidden_states=False)
        logits = outputs["prediction_logits" if "prediction_logits" in outputs else "logits"]
        total += functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        quality.tokens += int((labels != IGNORED).sum())
    quality.loss = total / quality.tokens if quality.tokens else None
    return quality


def _next(batch: Batch) -> tuple[Batch, torch.Tensor]:
    """The batch, and for each token the one that follows it."""
    ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"]
    following = functional.pad(ids[:, 1:], (0, 1), value=IGNORED)
    ends = functional.pad(mask[:, 1:], (0, 1)) == 0
    return batch, following.masked_fill(ends, IGNORED)[mask.bool()]


def _hidden(batch: Batch, mask_id: int | None) -> tuple[Batch, torch.Tensor]:
    """The batch with some tokens hidden, which are the labels; where nothing hides them, all are."""
    ids, kept = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    if mask_id is None:
        return batch, ids[kept]
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    hidden = kept & (positions % MASKED == 1)
    shown = Batch(batch.name, {**batch.inputs, "input_ids": ids.masked_fill(hidden, mask_id)})
    return shown, ids.masked_fill(~hidden, IGNORED)[kept]


def compare_quality(before: Quality, after: Quality) -> dict[str, Any]:
    """Both losses; or of models without one, how far the outputs are apart (norm of the difference, relative)."""
    if before.loss is not None and after.loss is not None:
        return {
            "measure": f"loss on the {before.kind}",
            "tokens": before.tokens,
            "before": before.loss,
            "after": after.loss,
            "difference": after.loss - before.loss,
        }
    apart = {}
    for name in before.outputs[0] if before.outputs else ():
        one, other = (torch.cat([out[name].flatten() for out in quality.outputs]) for quality in (before, after))
        apart[name] = ((one - other).norm() / one.norm().clamp(min=torch.finfo(one.dtype).tiny)).item()
    return {"measure": "relative difference of the outputs", "outputs": apart}


def measure(
    model: PreTrainedModel, layers: Sequence[int], text: Text, *, norms: bool = False
) -> tuple[Quality, Usage]:
    """Runs `text` once; `norms` (of the experts' outputs) cost as much as the experts once more."""
    usage, tokens = Usage(), dict.fromkeys(layers, 0)

    def see(layer: int, experts: torch.nn.Module, x_TD, index_TK, gates_TK) -> None:
        if layer not in usage.counts:
            size = int(experts.num_experts)  # type: ignore[arg-type]
            usage.counts[layer] = torch.zeros(size, dtype=torch.float64)
            usage.norms[layer] = torch.zeros(size, dtype=torch.float64)
        size = len(usage.counts[layer])
        usage.counts[layer] += torch.bincount(index_TK.flatten(), minlength=size + 1)[:size]  # empty slots come last
        usage.gates[layer] = usage.gates.get(layer, 0.0) + gates_TK.double().sum().item()
        tokens[layer] += len(x_TD)
        for index_T1, gates_T1 in zip(index_TK.split(1, 1), gates_TK.split(1, 1), strict=True) if norms else ():
            y_TD = experts.forward(x_TD, index_T1, torch.ones_like(gates_T1))
            size_T = y_TD.double().norm(dim=1) * gates_T1[:, 0]  # 0 in an empty slot
            usage.norms[layer].index_add_(0, index_T1[:, 0].clamp(max=size - 1), size_T)

    def see_gate(layer: int, logits_T: torch.Tensor) -> None:
        total = logits_T.double().sigmoid().sum().item()
        usage.shared_gates[layer] = usage.shared_gates.get(layer, 0.0) + total

    with watched(model, see, see_gate):
        quality = quality_of(model, text)
    for layer in layers:
        usage.gates[layer] /= max(tokens[layer], 1)
        usage.norms[layer] /= usage.counts[layer].clamp(min=1)
        if layer in usage.shared_gates:
            usage.shared_gates[layer] /= max(tokens[layer], 1)
    return quality, usage


@contextmanager
def watched(
    model: PreTrainedModel,
    see: Callable[..., None],
    see_gate: Callable[[int, torch.Tensor], None] = lambda layer, logits_T: None,
) -> Iterator[None]:
    """Calls `see(layer, experts, x_TD, index_TK, gates_TK)` wherever experts are, and `see_gate` with the logits of a
    shared expert's gate; padding is left out."""
    kept: list[torch.Tensor | None] = [None]

    def see_real(layer, experts, *values_and_mask) -> None:
        *values, kept[0] = values_and_mask
        see(layer, experts, *(value if kept[0] is None else value[kept[0]] for value in values))

    handles = attach(model, see_real)
    for layer, name in experts_of(model).items():
        gate = getattr(model.get_submodule(name.removesuffix(".experts")), "shared_expert_gate", None)
        if gate is not None:

            def after_gate(module, args, output, layer=layer):  # runs after the experts, whose mask it has
                see_gate(layer, output.flatten() if kept[0] is None else output.flatten()[kept[0]])

            handles.append(gate.register_forward_hook(after_gate))
    with removing(handles):
        yield


def gate_sums(model: PreTrainedModel, routers: dict[int, torch.Tensor], top_k: int, text: Text) -> dict[int, float]:
    """Mean sum of the `top_k` largest probabilities that other routers (layer -> (E, D)) would give, not renormalised,
    on what the model's own routers see."""
    sums, tokens = dict.fromkeys(routers, 0.0), dict.fromkeys(routers, 0)

    def see(layer: int, experts: torch.nn.Module, x_TD, index_TK, gates_TK) -> None:
        logits_TE = x_TD.float() @ routers[layer].float().T
        sums[layer] += logits_TE.softmax(-1).topk(top_k).values.double().sum().item()
        tokens[layer] += len(x_TD)

    with watched(model, see):
        quality_of(model, text)
    return {layer: total / max(tokens[layer], 1) for layer, total in sums.items()}
