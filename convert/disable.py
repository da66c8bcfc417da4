"""Experts that no token is sent to any more, exactly as if they were not there."""

import copy
import os
from collections.abc import Collection

from hf_moe.errors import UsageError
from hf_moe.modeling.configuration_moe import MoeConfigMixin

from .blend import Blend, copied, pieces, plan_tensors
from .classes import make_config
from .conversion import Progress, write_config
from .mixture import Mixture
from .reduce import Job, Reduced, open_job

VERB = "disable"


def disable(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    experts: Collection[tuple[int, int]],
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Writes the mixture `source` with some experts disabled; writes `disable.json` beside it.

    "As if not there" means: the router's products, scores, choices and gates are those of a router without the
    experts' rows, bit for bit, in every kind of router; and what the experts give follows from these.

    In our own classes the weights stay, and `disabled_experts` of the configuration says which rows are left out;
    taking it away enables them again. Transformers' own mixtures know no such thing: there the experts are taken out,
    which needs as many in every layer, and the others move up.

    Args:
        source: a mixture: a folder or a Hub id.
        experts: layer and expert.
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
    by_layer: dict[int, list[int]] = {}
    for layer, expert in sorted(set(experts)):
        if layer not in mixture.layers or not 0 <= expert < mixture.num_experts:
            raise UsageError(
                f"{source}: has no expert {layer}.{expert}; it has layers {', '.join(map(str, mixture.layers))}, "
                f"with experts 0 to {mixture.num_experts - 1}."
            )
        by_layer.setdefault(layer, []).append(expert)
    if not by_layer:
        raise UsageError(f"{source}: name an expert to disable, as LAYER.EXPERT.")
    return (_masked if isinstance(mixture.config, MoeConfigMixin) else _taken_out)(job, by_layer)


def _masked(job: Job, by_layer: dict[int, list[int]]) -> Reduced:
    mixture = job.mixture
    disabled = {layer: set(held) for layer, held in (mixture.config.disabled_experts or {}).items()}
    for layer, held in by_layer.items():
        disabled.setdefault(str(layer), set()).update(held)
    wanted = {layer: sorted(disabled[layer]) for layer in sorted(disabled, key=int)}
    values = {**mixture.config.to_dict(), "disabled_experts": wanted}
    config = make_config(type(mixture.config), values, UsageError, str(job.checkpoint.path))
    return job.write(
        [copied(info.name, info.dtype, info.shape) for info in job.checkpoint.tensors.values()],
        lambda tensor: job.checkpoint.read_pieces(tensor.name),
        {"disabled_experts": wanted},
        lambda folder: write_config(config, job.checkpoint, config.model_type, folder),
        job.model_class,
        {
            "disabled_experts": wanted,
            "notes": ["The weights are kept: without disabled_experts all are back."],
        },
    )


def _taken_out(job: Job, by_layer: dict[int, list[int]]) -> Reduced:
    mixture = job.mixture
    left = _left(mixture, by_layer)
    blend = Blend(mixture, {layer: tuple(((expert, 1.0),) for expert in kept) for layer, kept in left.items()})
    config = copy.deepcopy(mixture.config)
    config.num_experts = blend.num_experts
    return job.write(
        plan_tensors(blend),
        lambda tensor: pieces(tensor, blend),
        blend.decisions(),
        lambda folder: write_config(config, job.checkpoint, config.model_type, folder),
        job.model_class,
        {
            "num_experts": {"before": mixture.num_experts, "after": blend.num_experts},
            "experts": {str(layer): kept for layer, kept in left.items()},
            "notes": ["The experts are taken out: the others moved up, to the places where they stand in `experts`."],
        },
    )


def _left(mixture: Mixture, by_layer: dict[int, list[int]]) -> dict[int, list[int]]:
    path, name = mixture.checkpoint.path, type(mixture.config).__name__.removesuffix("Config")
    counts = {layer: len(by_layer.get(layer, ())) for layer in mixture.layers}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"{path}: Transformers' {name} routers can't be told to leave experts out, so they are taken out, as many "
            f"in every layer; named are {', '.join(f'{count} of layer {layer}' for layer, count in counts.items())}."
        )
    left = mixture.num_experts - next(iter(counts.values()))
    if left < max(2, mixture.top_k):
        raise UsageError(f"{path}: would be left with {left} experts a layer, but a token visits {mixture.top_k}.")
    return {
        layer: [expert for expert in range(mixture.num_experts) if expert not in by_layer[layer]]
        for layer in mixture.layers
    }
