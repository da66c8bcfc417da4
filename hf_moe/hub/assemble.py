"""Puts experts of artefacts into the base they were made for."""

import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hf_moe.convert.blend import copied
from hf_moe.convert.checkpoint import Checkpoint
from hf_moe.convert.conversion import Progress, write_config
from hf_moe.convert.fit import digest_of
from hf_moe.convert.headers import DTYPES
from hf_moe.convert.mixture import Mixture
from hf_moe.convert.plan import TensorPlan
from hf_moe.convert.reduce import Job, Reduced, open_job
from hf_moe.convert.refit import STAYS, check_fits, refit
from hf_moe.convert.slots import SHARED, Slot, slots_of
from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling.moe_artefact import decode

from .artefact import Artefact, check_base, key_of
from .difference import pieces_of
from .fitting import Fitting, read_fitting
from .pull import get_artefact
from .select import Choice, Spec, chosen

ROUTERS = ("along", "base", "fitted")


@dataclass(frozen=True)
class Patch:
    """A tensor of an artefact, the slot that it was made for, the one it goes to, and the spec that says so."""

    artefact: Artefact
    name: str
    made_for: Slot
    slot: Slot
    spec: int

    def values(self, checkpoint: Checkpoint) -> torch.Tensor:
        """Raises SourceError where it is damaged."""
        info = self.made_for.info
        old = next(pieces_of(checkpoint, info, max(info.nbytes, 1))).view(info.shape)
        try:
            return decode(self.name, self.artefact.entries[self.name], self.artefact.read(self.name), old)
        except ValueError as error:
            raise SourceError(f"{self.artefact.source}: {error}") from error


def compose(
    base: str | os.PathLike[str],
    output: str | os.PathLike[str],
    specs: Sequence[Spec],
    *,
    router: str = "along",
    texts: Mapping[str, str] | None = None,
    gate_mode: str | None = None,
    verb: str = "compose",
    revision: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
) -> Reduced:
    """Writes the mixture `base` with experts of artefacts in their places; writes `compose.json` beside it.

    One tensor of one expert is in memory at a time; of artefacts on the Hub only what is chosen is fetched. Fitting
    rows needs the memory of the base.

    Args:
        base: a folder or a Hub id; every artefact must have been made for these very files.
        specs: artefacts, and which of their experts.
        router: whether the routers' rows of the experts come "along", stay the "base"'s, or are "fitted" to texts.
        texts: for "fitted": spec -> file with what its experts are for, a passage a line; "base" for those that stay.
        gate_mode: for "fitted": how rows are made, as in `fuse`; by default "hidden".
        verb: names the report's file.
        revision, max_shard_size, overwrite, manifest, progress: as in `upcycle`.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
    """
    if router not in ROUTERS:
        raise UsageError(f"router is {router!r}; choose from {', '.join(ROUTERS)}.")
    if router != "fitted" and (texts or gate_mode):
        raise UsageError(
            f"texts and gate_mode are what rows are fitted to and by; router is {router!r}, not 'fitted'."
        )
    fitting = read_fitting(specs, texts or {}, gate_mode) if router == "fitted" else None
    job = open_job(
        verb,
        base,
        output,
        revision=revision,
        overwrite=overwrite,
        manifest=manifest,
        max_shard_size=max_shard_size,
        progress=progress,
    )
    if fitting is not None:
        check_fits(job.mixture)
    with tempfile.TemporaryDirectory(prefix="hf_moe.") as scratch:
        job.progress.stage("opening artefacts")
        artefacts = [get_artefact(spec, Path(scratch) / str(i)) for i, spec in enumerate(specs)]
        for artefact in artefacts:
            check_base(artefact, job.mixture)
        patches = _patches(job, artefacts, specs, router)
        if fitting is None:
            return _write(job, patches)
        return _write(job, patches, *_fit(job, patches, fitting))


def _patches(job: Job, artefacts: list[Artefact], specs: Sequence[Spec], router: str) -> dict[str, Patch]:
    """Name of each slot that is replaced -> by what."""
    slots, made = slots_of(job.mixture), dict[str, Patch]()
    for index, (artefact, spec) in enumerate(zip(artefacts, specs, strict=True)):
        keys = chosen((key_of(entry) for entry in artefact.entries.values()), spec.choices, artefact.source)
        for name, entry in artefact.entries.items():
            if key_of(entry) not in keys:
                continue
            _check_there(name, key_of(entry), slots, artefact.source)
            if slots[name].is_router and router != "along":
                continue
            for to in _goals(spec.choices, key_of(entry)):
                target = _target(name, to, slots, artefact.source)
                if target in made and made[target].artefact.entries[made[target].name]["sha256"] != entry["sha256"]:
                    raise UsageError(
                        f"{artefact.source}: holds expert {to}, and so does {made[target].artefact.source}; take it "
                        f"from one of them, or put one elsewhere ({spec.source}#{key_of(entry)}=LAYER.EXPERT)."
                    )
                made[target] = Patch(artefact, name, slots[name], slots[target], index)
    return made


def _goals(choices: tuple[Choice, ...], key: str) -> set[str]:
    """Where an expert goes."""
    return {choice.to or key for choice in choices if choice.fits(key)} or {key}


def _target(name: str, to: str, slots: dict[str, Slot], source: str) -> str:
    """The name of a slot in expert `to`."""
    layer, _, expert = to.partition(".")
    leaf = name.split(".", 4)[4]
    target = f"layers.{layer}.experts.{expert}.{leaf}"
    _check_there(target, to, slots, source)
    if slots[target].info.shape != slots[name].info.shape:
        raise UsageError(f"{source}: expert {slots[name].key} does not fit into {to}, which is of another shape.")
    return target


def _check_there(name: str, key: str, slots: dict[str, Slot], source: str) -> None:
    if name not in slots:
        keys = list(dict.fromkeys(slot.key for slot in slots.values()))
        raise UsageError(f"{source}: the base has no expert {key}; it has {keys[0]} to {keys[-1]} (LAYER.EXPERT).")


def _fit(job: Job, patches: dict[str, Patch], fitting: Fitting) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Routers (E, D) of the layers that routed experts are put in, and a report on them."""
    mixture = job.mixture
    put_in = {patch.slot.key: patch for patch in patches.values() if patch.slot.expert != SHARED}
    if not put_in:
        raise UsageError("router 'fitted': none of the experts that are put in has a row.")
    job.progress.stage("fitting the routers")
    layers = sorted({patch.slot.layer for patch in put_in.values()})
    class_of = {layer: torch.full((mixture.num_experts,), STAYS) for layer in layers}
    own = {layer: mixture.router(layer).clone() for layer in layers}
    slots = slots_of(mixture)
    for patch in put_in.values():
        layer, expert = patch.slot.layer, int(patch.slot.expert)
        class_of[layer][expert] = fitting.class_of[patch.spec]
        own[layer][expert] = _own_row(patch, slots, mixture)
    rows, routing = refit(job, fitting.gate, fitting.passages, list(fitting.files), class_of, own, fitting.rest)
    notes = routing.pop("notes")
    return rows, {"routing": {"texts": fitting.files, **routing}, "notes": notes}


def _own_row(patch: Patch, slots: dict[str, Slot], mixture: Mixture) -> torch.Tensor:
    """(D,): the router's row of an expert, from its artefact, or the base's where it did not change."""
    slot = slots[f"layers.{patch.made_for.layer}.experts.{patch.made_for.expert}.router.weight"]
    if slot.name in patch.artefact.entries:
        return replace(patch, name=slot.name, made_for=slot).values(mixture.checkpoint)
    return mixture.router(slot.layer)[int(slot.expert)]


def _write(
    job: Job,
    patches: dict[str, Patch],
    rows: dict[int, torch.Tensor] | None = None,
    report: dict[str, Any] | None = None,
) -> Reduced:
    """`rows` are routers that are replaced whole, `report` what is said of them."""
    mixture = job.mixture
    whole = {mixture.name(layer, mixture.form.router): rows_ED for layer, rows_ED in (rows or {}).items()}
    by_tensor: dict[str, list[Patch]] = {}
    for patch in sorted(patches.values(), key=lambda patch: patch.slot.start):
        by_tensor.setdefault(patch.slot.info.name, []).append(patch)
    taken = [
        {
            "expert": patch.slot.key,
            "tensor": name,
            "from": patch.artefact.source,
            "revision": patch.artefact.held.get("pulled", {}).get("commit"),
            "of": patch.made_for.key,
            **{key: patch.artefact.entries[patch.name][key] for key in ("how", "sha256", "error")},
        }
        for name, patch in patches.items()
    ]
    return job.write(
        [copied(info.name, info.dtype, info.shape) for info in mixture.checkpoint.tensors.values()],
        lambda tensor: (
            iter([whole[tensor.name]])
            if tensor.name in whole
            else _pieces(tensor, mixture.checkpoint, by_tensor.get(tensor.name, []))
        ),
        {"taken": taken, **({"fitted": digest_of(rows)} if rows else {})},
        lambda folder: write_config(mixture.config, job.checkpoint, mixture.config.model_type, folder),
        job.model_class,
        {
            "experts": list(dict.fromkeys(patch.slot.key for patch in patches.values())),
            "artefacts": list(dict.fromkeys(patch.artefact.source for patch in patches.values())),
            "error": max((entry["error"] for entry in taken), default=0.0),
            "taken": taken,
            **(report or {}),
        },
    )


def _pieces(tensor: TensorPlan, checkpoint: Checkpoint, patches: list[Patch]) -> Iterator[torch.Tensor]:
    """The base's values, but for what the patches, in order, replace."""
    info = checkpoint.tensors[tensor.name]
    itemsize, total = DTYPES[info.dtype].itemsize, info.nbytes // DTYPES[info.dtype].itemsize
    position = 0
    for start, patch in [*((patch.slot.start, patch) for patch in patches), (total, None)]:
        if start > position:
            between = replace(info, start=info.start + position * itemsize, shape=(start - position,))
            yield from pieces_of(checkpoint, between)
        if patch is not None:
            values = patch.values(checkpoint)
            yield values
            position = start + values.numel()
