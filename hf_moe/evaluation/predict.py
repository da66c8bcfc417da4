"""One pass of a model over rows, by as many processes as there are."""

import inspect
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from hf_moe.tasks import PreparedData, embed

from .measured import IGNORED
from .metrics import preprocess_logits_for

LABELS = ("labels", "start_positions", "end_positions")


@torch.inference_mode()
def predict(model: PreTrainedModel, prepared: PreparedData, split: str, *, batch_size: int = 8) -> tuple[Any, Any]:
    """(predictions, labels) of every row of a split, as Trainer would hand them to `compute_metrics`.

    Processes share the rows, and each gets all results. Rows run in the order of their length, for little padding.
    """
    state, rows = PartialState(), prepared.split(split)
    model = model.to(state.device).eval()
    lengths = [len(ids) for name in rows.column_names if name.endswith("input_ids") for ids in rows[name]]
    order = sorted(range(len(rows)), key=lambda row: lengths[row])
    own = order[state.process_index :: state.num_processes]
    made: list[tuple[int, list[np.ndarray], list[np.ndarray]]] = []
    for start in range(0, len(own), batch_size):
        chosen = own[start : start + batch_size]
        batch = prepared.collator([rows[row] for row in chosen])
        batch = {name: value.to(state.device) for name, value in batch.items()}
        outputs, labels = _forward(model, prepared.task, batch)
        for place, row in enumerate(chosen):
            made.append((row, [_array(part[place]) for part in outputs], [_array(part[place]) for part in labels]))
    made = sorted(gather_object(made), key=lambda entry: entry[0])
    return _joined([outputs for _, outputs, _ in made]), _joined([labels for _, _, labels in made])


def _forward(model: Any, task: str, batch: dict[str, Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    labels = [batch[name] for name in LABELS if name in batch]
    if task == "sentence-embedding":
        sides, _ = embed(model, batch)
        return [torch.stack(list(sides.values()), dim=1)], labels
    known = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in batch.items() if name in known and name not in LABELS}
    if "use_cache" in known:
        inputs["use_cache"] = False  # a cache would keep packed texts from being told apart
    outputs = model(**inputs)
    if task == "question-answering":
        return [outputs.start_logits, outputs.end_logits], labels
    kept = preprocess_logits_for(task)
    return [outputs.logits if kept is None else kept(outputs.logits, labels[0])], labels


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy() if tensor.is_floating_point() else tensor.cpu().numpy()


def _joined(rows: list[list[np.ndarray]]) -> Any:
    """One array of each part, or a tuple of several; shorter rows are filled up with `IGNORED`."""
    parts = [_padded(list(part)) for part in zip(*rows, strict=True)]
    return parts[0] if len(parts) == 1 else tuple(parts)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    if rows[0].ndim == 0 or len({row.shape for row in rows}) == 1:
        return np.stack(rows)
    longest = max(len(row) for row in rows)
    made = np.full((len(rows), longest, *rows[0].shape[1:]), IGNORED, dtype=rows[0].dtype)
    for place, row in enumerate(rows):
        made[place, : len(row)] = row
    return made
