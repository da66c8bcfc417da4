"""Writing a planned checkpoint tensor by tensor, in memory bounded by one dense tensor."""

import json
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from hf_moe.errors import SourceError, UsageError

from .checkpoint import INDEX_NAME, Checkpoint
from .experts import copy_expert
from .headers import DTYPES
from .plan import Plan, TensorPlan
from .routers import calibrated_normal


def write_weights(plan: Plan, checkpoint: Checkpoint, folder: Path, progress: Callable[[int], None]) -> None:
    """Writes the shards of `plan` into `folder`, and their index where there are several.

    `progress` is called with the number of bytes written since its last call.

    Raises:
        SourceError: where a source tensor holds NaN or Inf, or its file changed meanwhile.
    """
    shards = plan.shards
    for file, tensors in shards.items():
        _write_shard(folder / file, tensors, plan, checkpoint, progress)
    if len(shards) > 1:
        weight_map = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": plan.nbytes}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_shard(file: Path, tensors: list[TensorPlan], plan, checkpoint, progress) -> None:
    """Wide dtypes first, so that every tensor starts at a multiple of its item size, as safetensors wants it."""
    tensors = sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as handle:
        handle.write(struct.pack("<Q", len(raw)) + raw)
        for tensor in tensors:
            for part in METHODS[tensor.method](tensor, plan, checkpoint):
                data = part.contiguous().view(-1).view(torch.uint8).numpy().data
                handle.write(data)
                progress(len(data))


def _copied(tensor: TensorPlan, plan: Plan, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    yield _read(tensor.sources[0], plan, checkpoint)


def _experts(tensor: TensorPlan, plan: Plan, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    """One expert at a time."""
    parts = [_read(source, plan, checkpoint) for source in tensor.sources]
    dense = parts[0] if len(parts) == 1 else torch.cat(parts)
    if tensor.transposed:
        dense = dense.T.contiguous()
    generator = _generator(tensor, plan)
    for _ in range(tensor.shape[0]):
        expert = copy_expert(dense, plan.recipe.noise_std, generator)
        if plan.recipe.noise_std > 0 and dense.isfinite().all() and not expert.isfinite().all():
            raise UsageError(f"noise_std {plan.recipe.noise_std}: leads out of the numbers that {tensor.dtype} holds.")
        yield expert


def _router(tensor: TensorPlan, plan: Plan, checkpoint: Checkpoint) -> Iterator[torch.Tensor]:
    assert plan.family is not None  # as in every plan without problems
    norm = [_read(source, plan, checkpoint) for source in tensor.sources]
    rows = calibrated_normal(
        tensor.shape[0],
        norm[0].float() + plan.family.norm_offset if norm else torch.ones(tensor.shape[1]),
        norm[1] if len(norm) > 1 else None,
        plan.recipe.router_logit_std,
        _generator(tensor, plan),
    )
    yield rows.to(DTYPES[tensor.dtype])


METHODS: dict[str, Callable[[TensorPlan, Plan, Checkpoint], Iterator[torch.Tensor]]] = {
    "copy": _copied,
    "experts": _experts,
    "router": _router,
}


def _read(name: str, plan: Plan, checkpoint: Checkpoint) -> torch.Tensor:
    tensor = checkpoint.read(name)
    if tensor.is_floating_point() and not plan.recipe.allow_nonfinite and not tensor.isfinite().all():
        file = checkpoint.tensors[name].file
        raise SourceError(f"{file}: tensor {name!r} holds NaN or Inf; allow_nonfinite converts it as it is.")
    return tensor


def _generator(tensor: TensorPlan, plan: Plan) -> torch.Generator:
    """Seeded by the recipe and the tensor's name, so that nothing depends on the order of writing.

    (Through a checksum: PyTorch's CPU generator looks at 32 bits of a seed only.)
    """
    return torch.Generator().manual_seed(zlib.crc32(f"{plan.recipe.seed}/{tensor.name}".encode()))
