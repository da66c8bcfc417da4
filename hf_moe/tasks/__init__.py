"""Tasks: what a model is trained for and measured on, and the data for it."""

from .models import load_config, load_model, load_tokenizer
from .prepare import PreparedData, find_task, prepare_data
from .sentences import embed
from .settings import DataSettings
from .table import TASKS, Task

__all__ = [
    "TASKS",
    "DataSettings",
    "PreparedData",
    "Task",
    "embed",
    "find_task",
    "load_config",
    "load_model",
    "load_tokenizer",
    "prepare_data",
]
