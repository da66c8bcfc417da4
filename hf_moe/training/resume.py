"""Whether a run may go on from a checkpoint: only as the run that it was."""

from pathlib import Path
from typing import Any

from accelerate import PartialState

from hf_moe.errors import UsageError

from .checkpoints import is_whole, last_checkpoint, read_state
from .output import GO_ON
from .recipe import TrainRecipe, without_folders

# What may differ: it changes what is told and kept of a run, not what is computed.
FREE = {
    "output_dir",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "logging_steps",
    "logging_strategy",
    "logging_first_step",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "per_device_eval_batch_size",
}

# How long it runs, where no schedule looks at that.
LENGTH = {"max_steps", "num_train_epochs"}
ENDLESS = {"constant", "constant_with_warmup"}


def find_checkpoint(recipe: TrainRecipe, files: Path) -> Path | None:
    """The checkpoint that the recipe resumes from, if it does.

    Args:
        files: where an interrupted run of the same output left its own.

    Raises:
        UsageError: where there is none.
    """
    wanted = recipe.method.resume_from_checkpoint
    if wanted in (None, False):
        return None
    if wanted is True or wanted == "auto":
        found = last_checkpoint(files)
        if found is None and wanted is True:
            raise UsageError(f"{files.parent}: there is no whole checkpoint to resume from; leave {GO_ON} out.")
        return found
    given = Path(str(wanted)).expanduser()
    if not is_whole(given):
        beside = last_checkpoint(given)
        raise UsageError(f"{given}: is no whole checkpoint" + (f"; {beside} is one." if beside else "."))
    return given.resolve()


def kept(recipe: TrainRecipe, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps to be compared with later: the recipe, and what identifies the data."""
    return {"recipe": without_folders(recipe.flat()), "data": without_folders(identity(data))}


def identity(report: dict[str, Any]) -> dict[str, Any]:
    """Of a data report, what says which rows there were."""
    names = ("files", "dataset_name", "dataset_revision", "fingerprints", "columns", "labels")
    return {name: report[name] for name in names if name in report}


def _check_rows(checkpoint: Path, state: dict[str, Any], now: dict[str, Any]) -> set[str]:
    """The keys that may differ since another number of processes takes as many rows a step.

    Args:
        state: what the checkpoint kept.
        now: the recipe.

    Raises:
        UsageError: where it would take another number of rows, or the same in another order.
    """
    before, processes = len(state["processes"]), PartialState().num_processes
    if before == processes:
        return set()
    if now.get("train_sampling_strategy") == "group_by_length":
        raise UsageError(f"{checkpoint}: was made by {before} processes, on whose number group_by_length depends.")
    then = state["kept"]["recipe"]
    rows = before * _rows(then)
    if processes * _rows(now) != rows:
        raise UsageError(
            f"{checkpoint}: was made by {before} processes of {_rows(then)} rows a step each; {processes} take as "
            f"many where per_device_train_batch_size · gradient_accumulation_steps is {rows / processes:g}."
        )
    return {"per_device_train_batch_size", "gradient_accumulation_steps"}


def _rows(recipe: dict[str, Any]) -> int:
    return recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]


def check_same(checkpoint: Path, recipe: TrainRecipe, data: dict[str, Any]) -> None:
    """Refuses to go on with another recipe, or other data.

    Raises:
        UsageError: naming what differs.
    """
    state, now = read_state(checkpoint), kept(recipe, data)
    then = state["kept"]
    if not then:
        raise UsageError(f"{checkpoint}: holds no recipe; it was not made by a training recipe.")
    free = FREE | (LENGTH if now["recipe"]["lr_scheduler_type"] in ENDLESS else set())
    free |= _check_rows(checkpoint, state, now["recipe"])
    names = [name for name in {**then["recipe"], **now["recipe"]} if name not in free]
    changed = [name for name in names if then["recipe"].get(name) != now["recipe"].get(name)]
    if changed:
        told = ", ".join(f"{name} was {then['recipe'].get(name)!r}" for name in changed)
        why = " (a longer run needs a schedule without an end, such as constant)" if LENGTH & set(changed) else ""
        raise UsageError(f"{checkpoint}: was made by another recipe: {told}{why}. Go on with that one, or start anew.")
    if then["data"] != now["data"]:
        parts = [name for name in now["data"] if then["data"].get(name) != now["data"][name]]
        raise UsageError(f"{checkpoint}: was made with other data: {', '.join(parts)} differ. Start anew.")
