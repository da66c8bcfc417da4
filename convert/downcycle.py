"""Back to a dense model: what copies were made of comes back exactly, and experts that differ become one."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

from hf_moe.errors import CertificateError, SourceError, UsageError
from hf_moe.modeling.configuration_moe import MoeConfigMixin

from .blend import copied
from .certificate import TOLERANCE, certify, explain
from .checkpoint import open_checkpoint
from .classes import dense_class_of, make_config, sister_name, variant_of
from .conversion import Progress, write_config
from .families import FAMILIES
from .headers import DTYPES
from .mixture import Mixture
from .names import tensors_of
from .network import KINDS, Network, find_network
from .plan import TensorPlan
from .rebuild import Rebuild, plan_rebuild
from .reduce import Reduced, open_job, refuse_disabled
from .scheme import EXACT, NOT_PRESERVING

BY = ("auto", "average", "usage", "best")
NEEDS_TEXT = ("usage", "best")

# `model_type` of Transformers' own mixtures -> that of the dense model whose other layers are the same, and what its
# configuration must say for that.
DENSE_TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mistral", {}),
    "qwen2_moe": ("qwen2", {}),
    "qwen3_moe": ("qwen3", {"max_window_layers": 0}),  # its sliding window, if there is one, is that of all layers
}
OF_SAVING = ("model_type", "architectures", "auto_map", "upcycled_from", "transformers_version", "_name_or_path")


def downcycle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    by: str = "auto",
    text: str | os.PathLike[str] | None = None,
    verify: bool = True,
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Turns the mixture `source` into a dense checkpoint of a class that Transformers has; writes `downcycle.json`.

    While its experts are copies, it becomes exactly the network they are copies of, in any recipe's form: parts are
    put together again, and a shared expert joins them. Experts that differ are averaged, after their neurons are
    aligned, or one is chosen. Mixtral becomes Mistral, Qwen2-MoE Qwen2, and Qwen3-MoE Qwen3.

    Args:
        source: a mixture, ours or one of Transformers' own: a folder or a Hub id.
        output: a folder that does not exist yet.
        by: where experts differ: "average"; "usage", the average weighted by how many tokens of `text` they are sent;
            "best", the one that is sent most; "auto": by usage where there is a text, else the average.
        text: a file with a passage a line, on which the model runs before and after.
        verify: whether a result that should be exact is held against `source` (the certificate).
        revision, max_shard_size, overwrite, manifest, progress: as in `upcycle`.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
        CertificateError: where it should be exact, and is not; nothing is left behind.
    """
    if by not in BY:
        raise UsageError(f"by is {by!r}; choose from {', '.join(BY)}.")
    if by in NEEDS_TEXT and text is None:
        raise UsageError(f"by {by!r} needs a text, to see which experts are used.")
    job = open_job(
        "downcycle",
        source,
        output,
        revision=revision,
        overwrite=overwrite,
        manifest=manifest,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    refuse_disabled(job)
    dense_class = _dense_class(job.mixture, job.model_class)
    if text is not None:
        job.run_text(Path(text))
    job.progress.stage("comparing experts")
    rebuild = plan_rebuild(job, by)
    plan = _plan(rebuild, dense_class)

    def certified(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
        made = replace(open_checkpoint(folder), source=job.output.name, digests=digests)
        certificate = certify(made, job.checkpoint, tolerance=TOLERANCE, progress=job.progress.stage)
        if rebuild.exactness.kind == EXACT and not certificate["passed"]:
            raise CertificateError(f"{source}: the dense model is not the mixture's function: {explain(certificate)}")
        return certificate

    return job.write(
        plan.tensors,
        lambda tensor: pieces(tensor, plan),
        {**rebuild.blend.decisions(), "routed": rebuild.routed, "shared": rebuild.shared},
        lambda folder: write_config(plan.config, job.checkpoint, plan.config.model_type, folder),
        dense_class,
        {
            "by": rebuild.by,
            "exactness": rebuild.exactness.kind,
            "why_not_exact": list(rebuild.exactness.reasons),
            "intermediate_size": plan.width,
            **rebuild.blend.decisions(),
        },
        certified if verify and rebuild.exactness.kind != NOT_PRESERVING else None,
    )


@dataclass(frozen=True)
class DensePlan:
    """Args:
    rebuild: what makes the networks.
    config: the dense configuration.
    networks: layer -> where its network goes.
    tensors: everything that will be written, in order.
    width: neurons of a network; where the experts have fewer, the others do nothing.
    """

    rebuild: Rebuild
    config: PretrainedConfig
    networks: dict[int, Network]
    tensors: list[TensorPlan]
    width: int


def _dense_class(mixture: Mixture, model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    config = mixture.config
    if isinstance(config, MoeConfigMixin):
        return dense_class_of(model_class)
    if config.model_type not in DENSE_TYPES:
        raise UsageError(
            f"{mixture.checkpoint.path}: Transformers has no dense model with the layers of {config.model_type}."
        )
    dense_config = transformers.CONFIG_MAPPING[DENSE_TYPES[config.model_type][0]]
    name = sister_name(model_class, dense_config)
    if not hasattr(transformers, name):
        raise UsageError(f"{mixture.checkpoint.path}: Transformers has no {name}.")
    return getattr(transformers, name)


def _plan(rebuild: Rebuild, dense_class: type[PreTrainedModel]) -> DensePlan:
    mixture = rebuild.blend.mixture
    checkpoint = mixture.checkpoint
    width = _width(mixture, rebuild.width)
    config = _dense_config(mixture, dense_class, width)
    target, tied = tensors_of(dense_class, config)
    family = variant_of(FAMILIES[config.model_type], config.to_dict())
    networks = {layer: find_network(family, layer, mixture.body, target) for layer in mixture.layers}
    layer_of = {name: layer for layer in mixture.layers for name in mixture.names(layer)}
    tensors: dict[str, TensorPlan] = {}
    for name, info in checkpoint.tensors.items():
        plans = [copied(name, info.dtype, info.shape)]
        if name in layer_of:
            plans = _network_tensors(rebuild, networks[layer_of[name]], target)
        tensors |= {plan.name: plan for plan in plans}
    for name, tensor in target.items():
        if name not in tensors and name not in tied:
            raise SourceError(f"{checkpoint.path}: tensor {name!r} is missing, which a {dense_class.__name__} has.")
        if name in tensors and tensors[name].shape != tuple(tensor.shape):
            shapes = f"{list(tensors[name].shape)}, not {list(tensor.shape)}"
            raise SourceError(f"{checkpoint.path}: {name!r} has shape {shapes} as a {dense_class.__name__} has it.")
    return DensePlan(rebuild, config, networks, list(tensors.values()), width)


def _width(mixture: Mixture, width: int) -> int:
    """What all layers can have: that of the layers that are dense already, or else the experts'."""
    config, path = mixture.config, mixture.checkpoint.path
    ours = isinstance(config, MoeConfigMixin)
    if not ours and len(mixture.layers) == config.num_hidden_layers:
        return width
    wanted = config.dense_intermediate_size if ours else config.intermediate_size
    if width > wanted:
        raise UsageError(
            f"{path}: its experts make a network of {width} neurons, but its dense layers have {wanted}, and no class "
            "of Transformers has layers of two widths."
        )
    return wanted


def _dense_config(mixture: Mixture, dense_class: type[PreTrainedModel], width: int) -> PretrainedConfig:
    config = mixture.config
    config_class = dense_class.config_class
    assert config_class is not None
    left = (_declared(type(config)) - _declared(config_class)).union(OF_SAVING)
    values = {name: value for name, value in config.to_dict().items() if name not in left}
    if not isinstance(config, MoeConfigMixin):
        values |= {**DENSE_TYPES[config.model_type][1], "intermediate_size": width}
    values["architectures"] = [dense_class.__name__]
    return make_config(config_class, values, SourceError, f"{mixture.checkpoint.path}: makes no dense config.json")


def _declared(config_class: type[PretrainedConfig]) -> set[str]:
    aliases = config_class.attribute_map
    return {field.name for field in fields(config_class)} | set(aliases) | set(aliases.values())


def _network_tensors(rebuild: Rebuild, network: Network, target: dict[str, torch.Tensor]) -> list[TensorPlan]:
    plans = []
    checkpoint = rebuild.blend.mixture.checkpoint
    held = [name for name in rebuild.blend.mixture.names(network.layer) if ".experts." in name]
    for kind in KINDS:
        projections = network.projections(kind)
        for name in dict.fromkeys(projection.name for projection in projections.values()):
            plans.append(
                TensorPlan(
                    name=name,
                    dtype=checkpoint.tensors[held[0]].dtype,
                    shape=tuple(target[name].shape),
                    method="network",
                    sources=(),
                    layer=network.layer,
                    kind=kind,
                    roles=tuple(role for role, projection in projections.items() if projection.name == name),
                )
            )
    return plans


def pieces(tensor: TensorPlan, plan: DensePlan) -> Iterator[torch.Tensor]:
    """The values of `tensor`, in order."""
    if tensor.method == "copy":
        yield from plan.rebuild.blend.mixture.checkpoint.read_pieces(tensor.name)
        return
    made = torch.cat([_padded(tensor, role, plan) for role in tensor.roles])
    transposed = plan.networks[tensor.layer].projections(tensor.kind)[tensor.roles[0]].transposed
    yield (made.T if transposed else made).to(DTYPES[tensor.dtype])


def _padded(tensor: TensorPlan, role: str, plan: DensePlan) -> torch.Tensor:
    made = plan.rebuild.projection(tensor.layer, role, tensor.kind)
    if role == "down":
        return made if made.ndim == 1 else torch.nn.functional.pad(made, (0, plan.width - made.shape[1]))
    return torch.nn.functional.pad(made, (0,) * (2 * made.ndim - 1) + (plan.width - len(made),))
