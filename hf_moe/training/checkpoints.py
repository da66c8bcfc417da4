"""Checkpoints that a run goes on from as if it had never stopped."""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import has_length

from hf_moe.errors import SourceError

if TYPE_CHECKING:
    from .trainer import MoeTrainer

STATE_NAME = "hf_moe_state.json"
NAME = re.compile(r"checkpoint-(\d+)")


def last_checkpoint(folder: str | Path) -> Path | None:
    """The last whole one. Trainer's state is written last, so one killed meanwhile has none, or half of it."""
    found = {int(match[1]): path for path in Path(folder).glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    return next((found[step] for step in sorted(found, reverse=True) if is_whole(found[step])), None)


def is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (checkpoint / STATE_NAME).is_file()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `RunState` wrote.

    Raises:
        SourceError: where the checkpoint is none of ours, or not whole.
    """
    if not is_whole(checkpoint):
        raise SourceError(f"{checkpoint}: is no whole checkpoint of a training run; look for others beside it.")
    return json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))


class RunState(TrainerCallback):
    """What Trainer's checkpoints leave out: losses since the last log, sums of figures, counts of callbacks.

    Args:
        trainer: whose they are.
    """

    def __init__(self, trainer: "MoeTrainer"):
        self.trainer = trainer
        self.begin(None)

    def begin(self, checkpoint: Path | None) -> None:
        """Before training, from `checkpoint` or from the start."""
        self.checkpoint = checkpoint
        self.found = None if checkpoint is None else read_state(checkpoint)
        self.stopped = self.found is not None and self.found["stopped"]  # before its time
        self.logged_at = 0  # the step of the last log
        self.total_loss = 0.0  # of the steps before this process began, as far as logged
        self.passes = {"epoch": 0, "began": 0}  # over the rows: which one it is, and at which step it began

    def is_over(self) -> bool:
        """Whether no step is left: where a process ended between its last checkpoint and the output."""
        state = self.trainer.state
        return self.found is not None and (self.stopped or state.global_step >= state.max_steps)

    def begin_pass(self, *, epoch: int, train_dataloader: Any, epochs_trained: int, **others: Any) -> dict[str, Any]:
        """What Trainer must be told of the next pass over the rows.

        Of rows that are streamed it does not know how many there are, and would look for where a checkpoint was made
        in the first pass.
        """
        step, told = self.trainer.state.global_step, {"epoch": epoch}
        if self.found is not None and not has_length(train_dataloader):
            then = self.found["passes"]
            told["epoch"] = epoch + then["epoch"]
            if epoch == epochs_trained:
                self.passes = then
                parts = self.trainer.args.gradient_accumulation_steps
                told |= {
                    "epochs_trained": then["epoch"],
                    "steps_trained_in_current_epoch": (step - then["began"]) * parts,
                }
                return told
        self.passes = {"epoch": told["epoch"], "began": step}
        return told

    def mean_loss(self) -> float:
        """Over all steps of the run, whatever process ran them."""
        return (self.total_loss + self.trainer._total_loss_scalar) / max(self.trainer.state.global_step, 1)

    def save(self, folder: str) -> None:
        """All processes must call this; when it returns, everything is on disk but Trainer's state."""
        trainer = self.trainer
        mine = {"loss": float(trainer._tr_loss)}
        mine |= {name: callback.state_dict() for name, callback in self._with_states().items()}
        everybody = gather_object([mine])
        if trainer.args.should_save:
            left = trainer.state.max_steps - trainer.state.global_step
            state = {
                "logged_at": self.logged_at,
                "stopped": trainer.control.should_training_stop and left > 0,
                "passes": self.passes,
                "total_loss": self.total_loss + trainer._total_loss_scalar,
                "processes": everybody,
                "kept": trainer.kept,
            }
            (Path(folder) / STATE_NAME).write_text(json.dumps(state, indent=2), encoding="utf-8")
        trainer.accelerator.wait_for_everyone()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.found is None or self.checkpoint is None:
            return
        trainer = self.trainer
        best = self.checkpoint.parent / f"checkpoint-{state.best_global_step}"  # their folder may have been renamed
        if state.best_model_checkpoint is None and best.is_dir():
            state.best_model_checkpoint = str(best)
        state.compute_steps(args, state.max_steps)  # Trainer keeps those of the checkpoint
        self.logged_at = trainer._globalstep_last_logged = self.found["logged_at"]
        self.total_loss = self.found["total_loss"]
        number, index = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = share_out(self.found["processes"], number)[index]
        trainer._tr_loss.fill_(mine["loss"])
        for name, callback in self._with_states().items():
            if name in mine:
                callback.load_state_dict(mine[name], args.device)

    def _with_states(self) -> dict[str, Any]:
        callbacks = self.trainer.callback_handler.callbacks
        return {type(callback).__name__: callback for callback in callbacks if hasattr(callback, "load_state_dict")}


def share_out(states: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """What processes noted, for another number of them: means stay means, and counts stay as many."""
    if len(states) == number:
        return states
    first, others = _joined(states), dict(states[0])
    for name, held in states[0].items():
        if isinstance(held, dict):
            others[name] = held | _nothing(held) | _means(first[name])
    others["loss"] = first["loss"]
    return [first] + [others] * (number - 1)


MEANS = ("loss", "sums")  # of processes; all other numbers under COUNTS add up
COUNTS = ("tokens", "counts")


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for name, held in states[0].items():
        every = [state[name] for state in states]
        if isinstance(held, dict) and name not in (*MEANS, *COUNTS):
            joined[name] = _joined(every)
        elif name in MEANS:
            joined[name] = _each(every, lambda values: sum(values) / len(values))
        elif name in COUNTS:
            joined[name] = _each(every, sum)
        else:
            joined[name] = held
    return joined


def _each(values: list[Any], join: Any) -> Any:
    if isinstance(values[0], dict):
        keys = {key for value in values for key in value}
        return {key: _each([value[key] for value in values if key in value], join) for key in keys}
    if isinstance(values[0], list):
        return [join(column) for column in zip(*values, strict=True)]
    return join(values)


def _nothing(held: dict[str, Any]) -> dict[str, Any]:
    return {name: {} if isinstance(held[name], dict) else 0 for name in COUNTS if name in held}


def _means(held: dict[str, Any]) -> dict[str, Any]:
    return {name: held[name] for name in MEANS if name in held}


def remove_broken(folder: Path) -> None:
    """Takes away checkpoints that were being written when the process ended."""
    for path in folder.glob("checkpoint-*"):
        if not is_whole(path):
            shutil.rmtree(path)
