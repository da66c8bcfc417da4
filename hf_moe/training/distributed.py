"""What training on several devices must be told of a mixture, since neither Transformers nor Accelerate asks it."""

import os
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.distributed import DistributedConfig

from hf_moe.errors import UsageError
from hf_moe.routing.hooks import experts_of

LEAF_CLASSES = "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"


def distributed_config(config: PretrainedConfig, **sizes: Any) -> DistributedConfig:
    """`DistributedConfig(**sizes)`, for the `from_pretrained` of a mixture, once it is known to fit: before processes
    wait for each other.

    Args:
        config: the mixture's, ours or one of Transformers' own.
        sizes: `fsdp_size`, `ep_size`, `tp_size` and what else `DistributedConfig` takes.

    Raises:
        UsageError: where it does not fit the mixture, or the number of processes; in one line.
    """
    wanted = planned_shares(config, **sizes)
    started = int(os.environ.get("WORLD_SIZE", 1))
    needed = wanted.pp_size * wanted.dp_size * wanted.tp_size  # type: ignore[operator]
    if needed != started:
        raise UsageError(
            f"distributed: pp_size {wanted.pp_size} · data parallel size {wanted.dp_size} · tp_size {wanted.tp_size} "
            f"make {needed} processes, but {started} were started; use `torchrun --nproc-per-node {needed}`."
        )
    return wanted


def planned_shares(config: PretrainedConfig, **sizes: Any) -> DistributedConfig:
    """As `distributed_config`, whatever processes there are now."""
    try:
        wanted = DistributedConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise UsageError(f"distributed: {' '.join(str(error).split())}") from error
    ep_size: Any = wanted.ep_size
    if ep_size == 1:
        return wanted
    experts = getattr(config, "num_experts", None)
    if experts is None:
        raise UsageError(f"ep_size is {ep_size}, but a {config.model_type} has no experts to share out.")
    if not getattr(config, "base_model_ep_plan", None):
        raise UsageError(f"ep_size is {ep_size}, but a {config.model_type} has no plan of how experts are shared out.")
    if experts % ep_size:
        what = "are more processes than" if ep_size > experts else "does not divide"
        fitting = [size for size in range(1, experts + 1) if experts % size == 0]
        raise UsageError(
            f"ep_size {ep_size} {what} the {experts} experts of a layer, which each live on one process; "
            f"{', '.join(map(str, fitting))} would do."
        )
    return wanted


def leaf_classes(model: nn.Module) -> list[str]:
    """Names of the classes that hold a router and experts.

    ZeRO-3 gathers a module's weights when it runs. Where experts are modules, which of them run depends on the tokens,
    and processes would wait for each other for ever: their block has to be gathered whole. (Experts that lie in one
    module, as ours, need it less.)
    """
    blocks = (model.get_submodule(name.rpartition(".")[0]) for name in experts_of(model).values())
    return sorted({type(block).__name__ for block in blocks})


def set_leaf_modules(model: nn.Module, accelerator: Any) -> None:
    """Tells the DeepSpeed plugin of an `Accelerator`, if it has one, which modules are leaves, unless the user did.

    To be called before the model is prepared.
    """
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    if plugin is not None and plugin.transformer_moe_cls_names is None and LEAF_CLASSES not in os.environ:
        plugin.transformer_moe_cls_names = ",".join(leaf_classes(model))
