"""The routers' losses as part of Trainer's, and a loss of sentence embeddings.

Letters in names: N rows, D hidden.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

# Output of a mixture -> the field of its configuration that weights it in the loss.
TERMS = {
    "aux_loss": "router_aux_loss_coef",
    "z_loss": "router_z_loss_coef",
    "router_entropy": "router_entropy_coef",
}


def router_terms(outputs: Any) -> dict[str, torch.Tensor]:
    """Those of `TERMS` that a model returned, unweighted and apart from the graph where they are only read."""
    return {name: outputs[name] for name in TERMS if name in outputs and outputs[name] is not None}


def weighted(terms: Mapping[str, Any], config: Any) -> Any:
    """What they are in the loss of one batch."""
    return sum((getattr(config, TERMS[name], 0.0) * value for name, value in terms.items()), 0.0)


def label_share(inputs: dict[str, Any], num_items_in_batch: Any, *, shifted: bool) -> torch.Tensor | None:
    """The share that a micro-batch has of its step's labels, as Trainer counts them; None where it does not.

    Args:
        shifted: whether the head predicts the next token, so that the first label is none.
    """
    labels = inputs.get("shift_labels")
    if labels is None:
        labels = inputs.get("labels")
        labels = labels[..., 1:] if labels is not None and shifted else labels
    if num_items_in_batch is None or labels is None:
        return None
    return labels.ne(-100).sum() / num_items_in_batch


def contrastive_loss(
    anchor_ND: torch.Tensor, positive_ND: torch.Tensor, negative_ND: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Cross-entropy of each anchor's positive among all positives of the batch, and the negatives, by cosine times
    `scale` (multiple negatives ranking: Henderson et al. 2017, arXiv 1705.00652, section 4; with scale 20 as in
    Sentence-Transformers). All embeddings have length 1."""
    others_ND = positive_ND if negative_ND is None else torch.cat([positive_ND, negative_ND])
    scores_NN = scale * anchor_ND.float() @ others_ND.float().T
    return functional.cross_entropy(scores_NN, torch.arange(len(anchor_ND), device=scores_NN.device))
