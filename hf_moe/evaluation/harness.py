"""Benchmarks of the lm-eval harness, for causal models."""

import os
from typing import Any

from accelerate import PartialState

from hf_moe.errors import SourceError, UsageError
from hf_moe.tasks import load_model, load_tokenizer
from hf_moe.tasks.extras import need


def run_harness(
    model: str | os.PathLike[str],
    tasks: list[str],
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Task -> its figures, as lm-eval gives them.

    Args:
        tasks: the harness's names, or those of YAML files in `include_path`.
        limit: the first so many examples of each task.

    Raises:
        UsageError: where lm-eval is not installed, or does not know a task; SourceError: where one does not run.
    """
    need("lm-eval", "lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise UsageError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them.")
    loading: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    loaded = load_model("causal-lm", model, **loading).to(PartialState().device)  # lm-eval leaves it where it is
    wrapped = HFLM(pretrained=loaded, tokenizer=load_tokenizer(model, **loading), batch_size=batch_size)
    try:
        found = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=0, log_samples=False
        )
    except Exception as error:  # tasks download data and raise anything
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise SourceError(f"lm-eval: {', '.join(tasks)} does not run ({reason}).") from error
    return found["results"]
