"""Takes what a tuned mixture has changed of its base's experts out of it."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_moe.convert.checkpoint import open_checkpoint
from hf_moe.convert.conversion import Progress
from hf_moe.convert.headers import DTYPES
from hf_moe.convert.mixture import open_mixture
from hf_moe.convert.output import check_output, whole_folder
from hf_moe.convert.slots import Slot
from hf_moe.errors import UsageError
from hf_moe.modeling.moe_artefact import CONFIG_NAME, WEIGHTS_NAME

from .artefact import base_of, write_beside
from .difference import Difference, compare, pieces_of
from .encodings import How, encode
from .select import Choice, chosen
from .tensor_file import write_tensors


@dataclass(frozen=True)
class Exported:
    """Where an artefact lies, and its `experts_config.json`."""

    path: Path
    described: dict[str, Any]


def diff(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    *,
    base_revision: str | None = None,
    revision: str | None = None,
) -> Difference:
    """Which experts, routers and other tensors of `base` are different in `tuned`; both are folders or Hub ids.

    Raises:
        SourceError: where one is no mixture. UsageError: as `difference.compare`.
    """
    return compare(open_mixture(open_checkpoint(base, base_revision)), open_mixture(open_checkpoint(tuned, revision)))


def export(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    experts: tuple[Choice, ...] = (),
    how: How | None = None,
    leave_others: bool = False,
    base_revision: str | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes the experts of `tuned` that are not those of `base`, with their rows of the routers, to the folder
    `output`. One tensor of one expert is in memory at a time.

    Args:
        base, tuned: mixtures of one architecture and size; folders or Hub ids.
        experts: those that are written; by default all that changed.
        how: as what.
        leave_others: whether changes of tensors that are no expert's are left behind; else they are refused.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
    """
    how, progress, output = how or How(), progress or Progress(), Path(output).expanduser()
    how.check()
    progress.stage("comparing")
    found = diff(base, tuned, base_revision=base_revision, revision=revision)
    others = [name for names in found.others.values() for name in names]
    if others and not leave_others:
        raise UsageError(
            f"{tuned}: {len(others)} things that are no expert's changed too ({others[0]}, say), so it is not its "
            "base with other experts; --leave-others exports the experts without them."
        )
    slots = _wanted(found, experts, str(tuned))
    slots.sort(key=lambda slot: -how.itemsize(DTYPES[slot.info.dtype]))
    sources = [mixture.checkpoint for mixture in (found.base, found.tuned)]
    nbytes = sum(slot.info.nbytes for slot in slots)
    check_output(output, [source.path for source in sources], nbytes, overwrite, CONFIG_NAME)
    with whole_folder(output, "", overwrite, CONFIG_NAME) as (folder, _):
        progress.stage("writing")
        progress.total(nbytes)
        entries: dict[str, dict[str, Any]] = {}
        size = write_tensors(
            folder / WEIGHTS_NAME, _stored(found, slots, how, entries, progress), [slot.name for slot in slots]
        )
        described = _describe(found, how, entries, size)
        for source in sources:
            source.check_unchanged()
        identities = [source.identity for source in sources]
        like = found.base if others else found.tuned
        write_beside(folder, described, like.config, like.checkpoint, identities)
    return Exported(output, described)


def _wanted(found: Difference, experts: tuple[Choice, ...], tuned: str) -> list[Slot]:
    """Of experts that are named, all they have; else what changed."""
    if experts:
        keys = chosen(dict.fromkeys(slot.key for slot in found.slots.values()), experts, tuned)
        return [slot for slot in found.slots.values() if slot.key in keys]
    if not found.changed:
        raise UsageError(f"{tuned}: has the experts and routers of its base, so there is nothing to export.")
    return [found.slots[name] for name in found.changed]


def _stored(
    found: Difference, slots: list[Slot], how: How, entries: dict[str, dict[str, Any]], progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each slot as it is stored; notes its entry."""
    for slot in slots:
        old, new = (
            next(pieces_of(mixture.checkpoint, info, max(info.nbytes, 1))).view(info.shape)
            for mixture, info in ((found.base, slot.info), (found.tuned, found.tuned_slots[slot.name].info))
        )
        stored, entry = encode(slot.name, old, new, how)
        place = {"layer": slot.layer, "expert": slot.expert, "into": slot.info.name, "start": slot.start}
        entries[slot.name] = {**place, **entry}
        progress.wrote(slot.info.nbytes)
        yield slot.name, stored


def _describe(found: Difference, how: How, entries: dict[str, dict[str, Any]], size: int) -> dict[str, Any]:
    tuned = sum(info.nbytes for info in found.tuned.checkpoint.tensors.values())
    whole = set(found.changed) <= set(entries) and not any(found.others.values())
    return {
        "base": base_of(found.base.checkpoint),
        "tuned": found.tuned.checkpoint.source,
        "class": next(iter(found.tuned.config.architectures or []), None),
        "model_type": found.tuned.config.model_type,
        "num_experts": found.base.num_experts,
        "width": found.base.width,
        "how": how.kind,
        "complete": whole,
        "bytes": size,
        "tuned_bytes": tuned,
        "smaller": round(tuned / size, 2),
        "error": max(entry["error"] for entry in entries.values()),
        "tensors": entries,
    }
