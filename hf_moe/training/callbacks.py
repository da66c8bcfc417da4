"""Early stopping, with what it needs checked; and what is told on standard error."""

import sys
from dataclasses import replace
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import IntervalStrategy

from hf_moe.errors import UsageError
from hf_moe.evaluation import metrics_for
from hf_moe.tasks import PreparedData

from .freezing import in_words, what_trains
from .settings import MethodSettings
from .trainer import MoeTrainer

PROBE = 8  # rows that metrics are asked of before training


class EarlyStopping(EarlyStoppingCallback):
    """Transformers', counting on where a run is resumed."""

    def state_dict(self) -> dict[str, Any]:
        return {"patience_counter": self.early_stopping_patience_counter}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.early_stopping_patience_counter = state["patience_counter"]


def early_stopping(settings: MethodSettings, args: Any) -> list[TrainerCallback]:
    """The callback of a recipe, if it wants one.

    Raises:
        UsageError: where it could not work.
    """
    patience = settings.early_stopping_patience
    if patience is None:
        if settings.early_stopping_threshold:
            raise UsageError("early_stopping_threshold is given without early_stopping_patience.")
        return []
    if patience < 1:
        raise UsageError(f"early_stopping_patience is {patience}; it must be at least 1.")
    if args.eval_strategy == IntervalStrategy.NO:
        raise UsageError("Early stopping needs evaluations: set eval_strategy to epoch or steps.")
    if not args.load_best_model_at_end:
        raise UsageError("Early stopping keeps the best model: set load_best_model_at_end to true.")
    return [EarlyStopping(patience, float(settings.early_stopping_threshold))]


def check_metric(trainer: MoeTrainer, data: PreparedData) -> None:
    """Looks for `metric_for_best_model` among what evaluation gives, by evaluating a few rows, and all of them
    before it is refused. (Not where the model is sharded: what evaluates before training can't be sharded again.)

    Raises:
        UsageError: where it is not there, naming those that are.
    """
    wanted = trainer.args.metric_for_best_model
    if wanted is None or data.validation is None or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        return
    names: list[str] = []
    for rows in (first_rows(data, PROBE), data):  # some figures need rows that are not among the first
        names = _figures_of(trainer, rows)
        if f"eval_{wanted.removeprefix('eval_')}" in names:
            return
    speeds = ("_runtime", "_per_second", "_preparation_time")
    told = sorted(name.removeprefix("eval_") for name in names if not name.endswith(speeds))
    raise UsageError(f"metric_for_best_model is {wanted!r}, but evaluation gives {', '.join(told)}.")


def _figures_of(trainer: MoeTrainer, data: PreparedData) -> list[str]:
    rows: Any = data.split("validation")
    if len(rows) == 0:
        return []
    metrics, trainer.compute_metrics = trainer.compute_metrics, metrics_for(data.task, data)
    try:
        return list(trainer.predict(rows, metric_key_prefix="eval").metrics or {})
    finally:
        trainer.compute_metrics = metrics


def first_rows(data: PreparedData, number: int) -> PreparedData:
    """The data with no more than `number` rows for validation, and what is made of them."""
    raw = data.raw["validation"].select(range(min(number, len(data.raw["validation"]))))
    details: Any = data.details.get("validation")
    rows = data.split("validation")
    if hasattr(details, "select"):  # windows on the examples
        kept = [place for place, example in enumerate(details["example"]) if example < len(raw)]
        details = details.select(kept)
    else:
        kept = list(range(min(number, len(rows))))
        details = None if details is None else [details[place] for place in kept]
    return replace(
        data,
        validation=rows.select(kept),
        raw=data.raw | {"validation": raw},
        details=data.details | ({} if details is None else {"validation": details}),
    )


class Printer(PrinterCallback):
    """A line a log, on standard error."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and logs:
            print(line_of(state, logs), file=sys.stderr)


class Bar(ProgressCallback):
    """A bar on a terminal, and the logs above it."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(line_of(state, logs), file=sys.stderr)


class WhatTrains(TrainerCallback):
    """A line on standard error, before the first step."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            print(f"trains: {in_words(what_trains(model))}", file=sys.stderr)


LEFT_OUT = ("epoch", "total_flos", "tokens_seen")
LOAD = "load/"  # of a figure for each expert; the smallest and the largest are shown


def line_of(state: Any, logs: dict[str, Any]) -> str:
    told = {name: value for name, value in logs.items() if name not in LEFT_OUT and not name.startswith(LOAD)}
    if loads := [share for name, share in logs.items() if name.startswith(LOAD)]:
        told |= {"load_min": min(loads), "load_max": max(loads)}
    figures = (f"{name} {f'{value:.4g}' if isinstance(value, float) else value}" for name, value in told.items())
    return f"step {state.global_step}/{state.max_steps}: {' '.join(figures)}"


def tell_on_stderr(trainer: MoeTrainer, *, quiet: bool) -> None:
    """Puts ours in the place of the callbacks that print on standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if not quiet:
        trainer.add_callback(WhatTrains())
        trainer.add_callback(Bar() if sys.stderr.isatty() else Printer())
