"""Rows of a mixture's routers fitted anew, for experts that were put in: to what its routers read of their texts.

Letters in names: N tokens, D hidden, E experts, C classes of text.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_moe.errors import SourceError, UsageError

from .compare import Batch, run_once
from .fit import LOGIT_STD, Passages, Reader, open_fit
from .mixture import Mixture
from .reduce import Job
from .routers import logit_deviation, spread
from .usage import load_for_text, watched

STAYS = -1  # class of an expert that was not replaced
# `router_type` -> what it does with its rows, so that they are not fitted.
UNFIT = {
    "laplace": "measure distances to their rows",
    "sigmoid": "have a bias for each row, balanced for the rows that they had",
}


def check_fits(mixture: Mixture) -> None:
    """Raises UsageError where rows can't be fitted to texts."""
    config = mixture.config
    kind = getattr(config, "router_type", "softmax")
    for holds, why in (
        (mixture.inputs != "input_ids", f"reads {mixture.inputs}, not texts, which rows are fitted to"),
        (kind in UNFIT, f"has routers of type {kind!r}, which {UNFIT.get(kind)}, so that none are fitted"),
        (
            getattr(config, "router_group_size", 1) > 1,
            "takes experts in groups (router_group_size), not by their rows",
        ),
        (
            bool(getattr(config, "disabled_experts", None)),
            "has disabled experts (disabled_experts in config.json), to which nothing goes whatever their rows",
        ),
    ):
        if holds:
            raise UsageError(f"{mixture.checkpoint.path}: {why}; take router 'along' or 'base'.")


def refit(
    job: Job,
    gate: str,
    passages: Sequence[Passages],
    names: Sequence[str],
    class_of: dict[int, torch.Tensor],
    own: dict[int, torch.Tensor],
    rest: int | None = None,
) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Rows (E, D) for the layers that experts were put in, in the dtype of the mixture's, and a report on them.

    The mixture is loaded for this.

    Args:
        job: with the mixture as it was, which passes `check_fits`.
        gate: of `GATES`.
        passages, names: what experts of each class should get, and what the class is called.
        class_of: layer -> (E,), the class of each expert that was put in, `STAYS` of the others.
        own: layer -> (E, D), the rows that they had where they come from.
        rest: the class whose passages are for the experts that stay, if there is one.

    Returns:
        the rows, and `gate`, `notes`, and `layers` as in `Fit.report`.

    Raises:
        UsageError, SourceError: as `open_fit`, or where rows are not finite.
    """
    mixture = job.mixture
    fit = open_fit(gate, passages, names, job.checkpoint, mixture.config, partial(mixture_reader, job))
    routers, layers = {}, []
    for layer, class_E in class_of.items():
        base_ED, x_ND = mixture.router(layer), fit.to.x[layer].double()
        made_ED = place(fit.rows(layer), base_ED.double(), own[layer].double(), class_E, x_ND, rest)
        routers[layer] = made_ED.to(base_ED.dtype)
        if not bool(routers[layer].isfinite().all()):
            raise SourceError(f"{job.checkpoint.path}: layer {layer}'s router has rows with NaN or Inf.")
        label_E = class_E if rest is None else class_E.masked_fill(class_E == STAYS, rest)
        layers.append(fit.report(layer, routers[layer], label_E))
    return routers, {"gate": gate, "layers": layers, "notes": fit.notes(layers)}


def mixture_reader(job: Job) -> Reader:
    """The mixture as it was, in bfloat16 where it is stored so, else in float32."""
    model = load_for_text(job.model_class, job.checkpoint)
    return Reader(model, job.mixture.layers, partial(_router_inputs, model.base_model))  # type: ignore[arg-type]


def _router_inputs(body: PreTrainedModel, batch: Batch) -> dict[int, torch.Tensor]:
    """What the experts read, the routers do."""
    x: dict[int, torch.Tensor] = {}

    def see(layer: int, experts: torch.nn.Module, x_ND: torch.Tensor, *choice: torch.Tensor) -> None:
        x[layer] = x_ND

    with watched(body, see):
        run_once(body, batch)
    return x


def place(
    fitted_CD: torch.Tensor,
    base_ED: torch.Tensor,
    own_ED: torch.Tensor,
    class_E: torch.Tensor,
    x_ND: torch.Tensor,
    rest: int | None = None,
) -> torch.Tensor:
    """(E, D): fitted rows among those that stay.

    Where some stay, the fitted ones get the deviation that the base's logits have on the texts, and stand around the
    mean of the rows that stay: on what is for it, an expert that was put in has a larger logit than those that stay
    have on average, on what is for others a smaller one. With passages of the `rest`, "others" are these. Where none
    stays, rows are those of a fusion. Experts of one class get its row, and differ by what their own rows do.

    Args:
        fitted_CD: as `GATES` make them.
        base_ED: rows before; own_ED, class_E: as in `refit`.
        x_ND: what the router reads of the texts.
        rest: as in `refit`.
    """
    stays_E = class_E == STAYS
    if stays_E.any():
        rows_CD = spread(fitted_CD, x_ND, logit_deviation(base_ED, x_ND) or LOGIT_STD)
        rows_CD = rows_CD - (0 if rest is None else rows_CD[rest]) + base_ED[stays_E].mean(dim=0)
    else:
        rows_CD = spread(fitted_CD, x_ND, LOGIT_STD)
    made_ED = base_ED.clone()
    for label in class_E[~stays_E].unique():
        among_ED = own_ED[class_E == label]
        made_ED[class_E == label] = rows_CD[label] + (among_ED - among_ED.mean(dim=0))
    return made_ED
