"""`training.json`: what was trained on what, by which software, and how it went."""

import math
import platform
from importlib import metadata
from typing import Any

import torch

from hf_moe.tasks import PreparedData

from .compute import FORMULA
from .recipe import TrainRecipe, without_folders
from .trainer import MoeTrainer

REPORT_NAME = "training.json"
FORMAT = 1
LIBRARIES = ("hf_moe", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Of everything that may change a result."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def report_of(
    recipe: TrainRecipe, trainer: MoeTrainer, data: PreparedData, trains: dict[str, Any], metrics: dict[str, float]
) -> dict[str, Any]:
    """What the file holds, JSON-able; without paths of this machine."""
    state, args = trainer.state, trainer.args
    told = without_folders(
        {
            "format": FORMAT,
            "task": data.task,
            "model": recipe.model.model_name_or_path,
            "class": type(trainer._base_model()).__name__,
            "trains": trains,
            "active_parameters": round(trainer.active.all),
            "data": data.report,
            "seeds": {"seed": args.seed, "data_seed": args.data_seed},
            "steps": state.global_step,
            "epochs": state.epoch,
            "tokens": trainer.figures.tokens_seen,
            "active_flops": state.total_flos,
            "active_flops_formula": FORMULA,
            "processes": trainer.accelerator.num_processes,
            "distributed": str(trainer.accelerator.distributed_type.value),
            "device": torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu",  # type: ignore[union-attr]
            "best": {
                "metric": args.metric_for_best_model,
                "value": state.best_metric,
                "step": state.best_global_step,
            }
            if state.best_metric is not None
            else None,
            "metrics": metrics,
            "loads": {str(layer): row for layer, row in (trainer.monitor.loads if trainer.monitor else {}).items()},
            "versions": versions(),
            "history": state.log_history,
        }
    )
    return without_nan(told)


def without_nan(value: Any) -> Any:
    """None in the place of figures that there are none of: JSON has no NaN."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return {name: without_nan(item) for name, item in value.items()} if isinstance(value, dict) else value
