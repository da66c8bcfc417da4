"""Which experts, routers and other tensors of a mixture a tuned copy of it has changed."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_moe.convert.checkpoint import PIECE_BYTES, Checkpoint
from hf_moe.convert.headers import FLOATS, TensorInfo
from hf_moe.convert.mixture import Mixture
from hf_moe.convert.slots import Slot, slots_of
from hf_moe.errors import UsageError

# Of a configuration, what decides how tokens are sent.
ROUTING = (
    "num_experts_per_tok",
    "norm_topk_prob",
    "router_type",
    "router_top_p",
    "router_capacity_factor",
    "router_group_size",
    "disabled_experts",
    "hidden_act",
)


@dataclass(frozen=True)
class Difference:
    """Args:
    base, tuned: the mixtures.
    slots, tuned_slots: name -> where it lies in either.
    changed: name of each slot whose bytes differ -> by how much: norm of the difference, relative to the base's.
    others: tensors that are no expert's: "changed", "added" and "removed"; "settings" of config.json that changed.
    """

    base: Mixture
    tuned: Mixture
    slots: dict[str, Slot]
    tuned_slots: dict[str, Slot]
    changed: dict[str, float]
    others: dict[str, list[str]]

    def describe(self) -> dict[str, Any]:
        """For JSON: LAYER.EXPERT of what changed; of experts, the largest relative change of their tensors, None where
        that is no number."""
        experts: dict[str, float | None] = {}
        for name, change in self.changed.items():
            key, known = self.slots[name].key, experts.get(self.slots[name].key, 0.0)
            if not self.slots[name].is_router:
                experts[key] = None if known is None or not math.isfinite(change) else max(change, known)
        routers = {self.slots[name].key for name in self.changed if self.slots[name].is_router}
        order = dict.fromkeys(slot.key for slot in self.slots.values())
        return {
            "base": self.base.checkpoint.source,
            "tuned": self.tuned.checkpoint.source,
            "experts": {key: experts[key] for key in order if key in experts},
            "routers": [key for key in order if key in routers],
            "unchanged_experts": sum(key not in experts and key not in routers for key in order),
            **{f"others_{what}": names for what, names in self.others.items()},
        }


def compare(base: Mixture, tuned: Mixture) -> Difference:
    """Compares bytes, so that -0 is not 0 and every NaN is itself; a piece of a tensor is in memory at a time.

    Raises:
        UsageError: where the two are not of one architecture, with as many experts of one size and dtype.
    """
    slots, tuned_slots = slots_of(base), slots_of(tuned)
    _check_alike(base, tuned, slots, tuned_slots)
    for mixture in (base, tuned):
        _ = mixture.checkpoint.stamps  # by which a change from here on is seen
    changed = {}
    for name, slot in slots.items():
        change = _change(base.checkpoint, slot.info, tuned.checkpoint, tuned_slots[name].info)
        if change is not None:
            changed[name] = change
    return Difference(base, tuned, slots, tuned_slots, changed, _others(base, tuned, slots, tuned_slots))


def pieces_of(checkpoint: Checkpoint, info: TensorInfo, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
    """The values of a part of a tensor, as `Checkpoint.read_pieces` gives those of a whole one."""
    return replace(checkpoint, tensors={info.name: info}).read_pieces(info.name, piece_bytes)


def same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _change(base: Checkpoint, old: TensorInfo, tuned: Checkpoint, new: TensorInfo) -> float | None:
    """None where both are the same bytes; else as in `Difference.changed` (0 for integers)."""
    differs, away, size = False, 0.0, 0.0
    for one, other in zip(pieces_of(base, old), pieces_of(tuned, new), strict=True):
        if not same_bytes(one, other):
            differs = True
            if old.dtype in FLOATS:
                away += (other.double() - one.double()).square().sum().item()
        if old.dtype in FLOATS:
            size += one.double().square().sum().item()
    return (away / max(size, 1e-300)) ** 0.5 if differs else None


def _check_alike(base: Mixture, tuned: Mixture, slots: dict[str, Slot], tuned_slots: dict[str, Slot]) -> None:
    paths = f"{base.checkpoint.path} and {tuned.checkpoint.path}"
    kinds = [mixture.config.model_type for mixture in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{paths}: one is a {kinds[0]}, the other a {kinds[1]}.")
    if base.num_experts != tuned.num_experts:
        raise UsageError(f"{paths}: one has {base.num_experts} experts a layer, the other {tuned.num_experts}.")
    missing = sorted(slots.keys() ^ tuned_slots.keys())
    if missing:
        raise UsageError(f"{paths}: only one of them has {missing[0]}.")
    for name, slot in slots.items():
        other = tuned_slots[name].info
        if slot.info.shape != other.shape:
            raise UsageError(f"{paths}: {name} is {list(slot.info.shape)} in one, {list(other.shape)} in the other.")
        if slot.info.dtype != other.dtype:
            raise UsageError(
                f"{paths}: {name} is {slot.info.dtype} in one, {other.dtype} in the other; save both in one dtype."
            )


def _others(
    base: Mixture, tuned: Mixture, slots: dict[str, Slot], tuned_slots: dict[str, Slot]
) -> dict[str, list[str]]:
    held = [
        {name: info for name, info in mixture.checkpoint.tensors.items() if name not in used}
        for mixture, used in (
            (base, {slot.info.name for slot in slots.values()}),
            (tuned, {slot.info.name for slot in tuned_slots.values()}),
        )
    ]
    both = [name for name in held[0] if name in held[1]]
    return {
        "changed": [
            name
            for name in both
            if (held[0][name].dtype, held[0][name].shape) != (held[1][name].dtype, held[1][name].shape)
            or _change(base.checkpoint, held[0][name], tuned.checkpoint, held[1][name]) is not None
        ],
        "added": [name for name in held[1] if name not in held[0]],
        "removed": [name for name in held[0] if name not in held[1]],
        "settings": [
            name for name in ROUTING if getattr(base.config, name, None) != getattr(tuned.config, name, None)
        ],
    }
