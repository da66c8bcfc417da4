"""Fewer experts: those that matter most are kept, or those that are alike become one."""

import copy
import itertools
import os
from pathlib import Path
from typing import Any

import torch

from hf_moe.errors import UsageError

from .align import group
from .blend import Blend, Group, order_between, pieces, plan_tensors, weighted
from .conversion import Progress, write_config
from .experts import take_neurons
from .mixture import Mixture
from .reduce import Job, Reduced, copy_size, open_job, refuse_disabled

BY = ("usage", "activation")


def prune(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_experts: int,
    text: str | os.PathLike[str],
    by: str = "usage",
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Keeps of each layer the `num_experts` experts that matter most on a text; writes `prune.json` beside them.

    By "activation" an expert matters by the mean, over the tokens sent to it, of its gate times the norm of its
    output (REAP: Lasby et al. 2025, arXiv 2510.13999); by "usage" by how many tokens are sent to it.
    Gates that are not renormalised are made up for: what is kept is scaled so that they sum to what they did.

    Args:
        source: a mixture, ours or one of Transformers' own: a folder or a Hub id.
        output: a folder that does not exist yet.
        num_experts: how many are left in each layer. Where they are fewer than a token visits, it visits all.
        text: a file with a passage a line, on which the model runs before and after.
        by: "usage" or "activation".
        revision, max_shard_size, overwrite, manifest, progress: as in `upcycle`.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
    """
    if by not in BY:
        raise UsageError(f"by is {by!r}; choose from {', '.join(BY)}.")
    job = _open("prune", source, output, num_experts, revision, max_shard_size, overwrite, manifest, progress)
    size = copy_size(job.mixture)
    job.run_text(Path(text), norms=by == "activation")
    scores = job.usage.counts if by == "usage" else job.usage.norms
    groups: dict[int, tuple[Group, ...]] = {}
    for layer in job.mixture.layers:
        of_copy = scores[layer].view(-1, size).sum(1)
        kept = of_copy.argsort(descending=True, stable=True)[: num_experts // size].sort().values.tolist()
        groups[layer] = tuple(((copy * size + part, 1.0),) for copy in kept for part in range(size))
    return _write(job, groups, num_experts, {"by": by, "scores": _lists(scores)})


def merge_experts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    num_experts: int,
    text: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Averages the experts of each layer that are most alike, until `num_experts` are left; writes
    `merge-experts.json` beside them.

    Their neurons are aligned first (see `align`). With a text, experts are weighted by how many of its tokens are
    sent to them. A group gets the router's row of its heaviest expert, without a text the average.
    Experts that are equal but for the order of their neurons merge exactly.

    One matrix of all experts of a layer is in memory at a time. Arguments and errors as in `prune`; without `text`
    nothing is run or measured, which needs gates that are renormalised.
    """
    job = _open("merge-experts", source, output, num_experts, revision, max_shard_size, overwrite, manifest, progress)
    mixture = job.mixture
    if text is None and not mixture.norm_topk_prob:
        raise UsageError(
            f"{mixture.checkpoint.path}: its gates are not renormalised, so what fewer experts' gates sum to must be "
            "measured: give a text."
        )
    size = copy_size(mixture)
    if text is not None:
        job.run_text(Path(text))
    job.progress.stage("aligning experts")
    groups = {}
    for layer in mixture.layers:
        weights = job.weights(layer)
        found = group(_apart(mixture, layer, size, weights), weights.view(-1, size).sum(1), num_experts // size)
        groups[layer] = tuple(
            weighted([copy * size + part for copy in copies], weights) for copies in found for part in range(size)
        )
    return _write(job, groups, num_experts, {})


def _open(verb, source, output, num_experts, revision, max_shard_size, overwrite, manifest, progress) -> Job:
    if type(num_experts) is not int:
        raise UsageError(f"num_experts is {num_experts!r}, but must be a whole number.")
    job = open_job(
        verb,
        source,
        output,
        revision=revision,
        overwrite=overwrite,
        manifest=manifest,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    refuse_disabled(job)
    router_type = getattr(job.mixture.config, "router_type", "softmax")
    if router_type != "softmax":
        raise UsageError(f"{source}: has routers of type {router_type!r}; {verb} knows softmax ones only.")
    held, size = job.mixture.num_experts, copy_size(job.mixture)
    if num_experts < 2:
        raise UsageError(f"num_experts is {num_experts}, but a mixture needs at least 2; downcycle makes one network.")
    if num_experts == held:
        raise UsageError(f"{source}: has {held} experts a layer already, so there is nothing to {verb.split('-')[0]}.")
    if num_experts > held:
        raise UsageError(f"num_experts is {num_experts}, but {source} has {held} a layer.")
    if num_experts % size:
        raise UsageError(
            f"num_experts {num_experts} is no multiple of {size}: so many experts of {source} make one copy, which "
            f"the router takes as a whole; {max(num_experts // size, 1) * size} would do."
        )
    return job


def _apart(mixture: Mixture, layer: int, size: int, weights: torch.Tensor) -> torch.Tensor:
    """Squared distances between the layer's copies, their neurons in the order of the heaviest one's."""
    count = mixture.num_experts // size
    first = int(weights.view(-1, size).sum(1).argmax())
    apart = torch.zeros(count, count, dtype=torch.float64)
    for part in range(size):
        experts = [copy * size + part for copy in range(count)]
        orders = {
            expert: order_between(mixture, layer, experts[first], expert)
            for expert in experts
            if expert != experts[first]
        }
        for role, kind in itertools.product(mixture.roles, mixture.kinds):
            held = [
                take_neurons(mixture.projection(layer, role, kind, expert), role, orders.get(expert))
                for expert in experts
            ]
            rows = torch.stack([values.float().flatten() for values in held])
            # not by products, which leave something between equals
            apart += torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").double().square()
    return apart


def _write(job: Job, groups: dict[int, tuple[Group, ...]], num_experts: int, report: dict[str, Any]) -> Reduced:
    mixture = job.mixture
    top_k = min(mixture.top_k, num_experts)
    unscaled = Blend(mixture, groups)
    scales = job.scales({layer: unscaled.router(layer) for layer in mixture.layers}, top_k)
    blend = Blend(mixture, groups, scales, unscaled.orders)
    config = copy.deepcopy(mixture.config)
    config.num_experts = num_experts
    if mixture.rank:
        config.expert_rank = 0
    config.num_experts_per_tok = top_k
    notes = []
    if top_k < mixture.top_k:
        notes.append(f"A token visited {mixture.top_k} experts, and now visits all {top_k}.")
    if scales:
        notes.append("The gates are not renormalised: the experts are scaled so that they count as they did.")
    return job.write(
        plan_tensors(blend),
        lambda tensor: pieces(tensor, blend),
        blend.decisions(),
        lambda folder: write_config(config, job.checkpoint, config.model_type, folder),
        job.model_class,
        {
            "num_experts": {"before": mixture.num_experts, "after": num_experts},
            "num_experts_per_tok": {"before": mixture.top_k, "after": top_k},
            **report,
            **blend.decisions(),
            "notes": notes,
        },
    )


def _lists(values: dict[int, torch.Tensor]) -> dict[str, list[float]]:
    return {str(layer): value.tolist() for layer, value in values.items()}
