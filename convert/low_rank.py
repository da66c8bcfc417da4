"""Experts of low rank become networks of their own: what they share is multiplied out, and the result is ordinary."""

import copy
import os

from hf_moe.errors import UsageError

from .blend import Blend, pieces, plan_tensors
from .conversion import Progress, write_config
from .reduce import Reduced, open_job

VERB = "expand-experts"


def expand_experts(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Writes a mixture whose experts share one network (`expert_rank`) with W + B·A of every expert instead; writes
    `expand-experts.json` beside them. The function is the same, to rounding: sums are taken in float32 at least.

    One matrix of one expert is in memory at a time.

    Args:
        source: a mixture of ours with an `expert_rank`: a folder or a Hub id.
        output: a folder that does not exist yet.
        revision, max_shard_size, overwrite, manifest, progress: as in `upcycle`.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
    """
    job = open_job(
        VERB,
        source,
        output,
        revision=revision,
        overwrite=overwrite,
        manifest=manifest,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    mixture = job.mixture
    if not mixture.rank:
        raise UsageError(f"{source}: its experts are networks of their own already (it has no expert_rank).")
    everyone = tuple(((expert, 1.0),) for expert in range(mixture.num_experts))
    blend = Blend(mixture, dict.fromkeys(mixture.layers, everyone))
    config = copy.deepcopy(mixture.config)
    config.expert_rank = 0
    tensors = plan_tensors(blend)
    return job.write(
        tensors,
        lambda tensor: pieces(tensor, blend),
        {},
        lambda folder: write_config(config, job.checkpoint, config.model_type, folder),
        job.model_class,
        {"expert_rank": mixture.rank, "bytes": sum(tensor.nbytes for tensor in tensors)},
    )
