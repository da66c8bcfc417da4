"""A training run: load, check, train, evaluate, save."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINING_ARGS_NAME

from hf_moe.convert import conversion, plan_upcycle
from hf_moe.convert.certificate import explain, read_certificate
from hf_moe.convert.checkpoint import open_checkpoint
from hf_moe.convert.describe import describe_plan
from hf_moe.errors import UsageError
from hf_moe.evaluation import metrics_for, preprocess_logits_for
from hf_moe.recipe import UpcycleRecipe, check_range
from hf_moe.tasks import PreparedData, load_config, load_tokenizer, prepare_data

from .callbacks import check_metric, early_stopping, tell_on_stderr
from .distributed import planned_shares
from .freezing import GradualUnfreezing, freeze, warn_of_router_rate, what_trains
from .model import kept_labels, model_for
from .output import check_free, files_of, run_folder
from .processes import on_main
from .recipe import TrainRecipe
from .report import REPORT_NAME, report_of
from .resume import check_same, find_checkpoint, kept
from .trainer import MoeTrainer

START = "start"  # where a dense checkpoint becomes a mixture, while the run lasts
LIMITS = {  # of numbers that Trainer takes as they come
    "per_device_train_batch_size": (1, None),
    "per_device_eval_batch_size": (1, None),
    "gradient_accumulation_steps": (1, None),
    "num_train_epochs": (0, None),
    "learning_rate": (0, None),
    "weight_decay": (0, None),
    "max_grad_norm": (0, None),
    "label_smoothing_factor": (0, 1),
}
BY_LENGTH = ("group_by_length", "batch_rebalance")
SMOOTHED = ("masked-lm", "causal-lm", "text-classification", "token-classification")


@dataclass(frozen=True)
class Trained:
    """What a run made.

    Args:
        path: the folder with the model.
        recipe: what it followed, resolved.
        metrics: of the last evaluation (`eval_…`) and of the test rows (`test_…`), and of training (`train_…`).
        report: what `training.json` holds.
    """

    path: Path
    recipe: TrainRecipe
    metrics: dict[str, float]
    report: dict[str, Any]


@dataclass(kw_only=True)
class Loaded:
    """What a recipe names, ready for Trainer.

    Args:
        trains: `what_trains` of the model, and `new`, the names of weights that the checkpoint did not have.
        use_cache: its configuration's.
    """

    tokenizer: Any
    data: PreparedData
    model: Any
    callbacks: list[TrainerCallback]
    trains: dict[str, Any]
    use_cache: bool | None


def train(recipe: TrainRecipe, *, overwrite: bool = False, quiet: bool = False) -> Trained:
    """Carries out `recipe`, in one process or as one of several.

    Args:
        overwrite: whether an existing output is replaced, once the new one is whole.
        quiet: whether nothing is told meanwhile.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
        TrainingError: where numbers are not finite; the checkpoints stay.
    """
    files = files_of(recipe.output)
    args = recipe.training_arguments(files)
    stopping = early_stopping(recipe.method, args)
    _check(recipe, args)
    source = Path(recipe.model.model_name_or_path).expanduser()
    checkpoint = on_main(lambda: find_checkpoint(recipe, files))
    resume = checkpoint is not None and checkpoint.is_relative_to(files)
    on_main(lambda: check_free(recipe.output, [source] if source.is_dir() else [], overwrite=overwrite, resume=resume))
    with _folder(recipe, resume=resume):
        start = _start(recipe, files)
        set_seed(args.seed)  # a new head is drawn now
        loaded = load(recipe, start)
        if checkpoint is not None:
            check_same(checkpoint, recipe, loaded.data.report)
        trainer = _trainer(recipe, args, loaded, stopping)
        tell_on_stderr(trainer, quiet=quiet)
        check_metric(trainer, loaded.data)
        metrics = _run(trainer, loaded, checkpoint)
        report = report_of(recipe, trainer, loaded.data, loaded.trains, metrics)
        report["start"] = on_main(lambda: _certified(files / START))
        on_main(lambda: _finish(files, recipe, report))
    return Trained(recipe.output, recipe, metrics, report)


@contextmanager
def _folder(recipe: TrainRecipe, *, resume: bool) -> Iterator[None]:
    """The run's folder, held by the main process; the others wait for it."""
    if PartialState().is_main_process:
        with run_folder(recipe.output, recipe.to_yaml(), resume=resume):
            yield
    else:
        yield
    PartialState().wait_for_everyone()


def _check(recipe: TrainRecipe, args: TrainingArguments) -> None:
    """Raises UsageError for keys that do not go together."""
    task, method = recipe.data.task, recipe.method
    for name, (low, high) in LIMITS.items():
        check_range(name, getattr(args, name), low, high)
    if args.label_smoothing_factor and task not in SMOOTHED:
        raise UsageError(f"label_smoothing_factor: {task} has no labels to smooth.")
    if args.train_sampling_strategy in BY_LENGTH and task == "sentence-embedding":
        raise UsageError(f"train_sampling_strategy: a row of {task} holds several texts, and has no one length.")
    if method.peft is not None and method.freeze != "none":
        raise UsageError("freeze and peft are both given; adapters freeze the rest by themselves, so leave one out.")
    if method.peft is not None:
        from .peft import adapter_options

        adapter_options(method.peft)
    if method.peft is not None and recipe.model.upcycle is not None:
        raise UsageError("upcycle and peft are both given; adapters need a mixture that stays: hf-moe upcycle first.")
    if method.router_learning_rate is not None and method.router_learning_rate < 0:
        raise UsageError(f"router_learning_rate is {method.router_learning_rate}; it can't be negative.")
    if args.metric_for_best_model is not None and args.eval_strategy == "no":
        raise UsageError("metric_for_best_model needs evaluations: set eval_strategy to epoch or steps.")


def load(recipe: TrainRecipe, path: str) -> Loaded:
    """Tokenizer, data and model of `recipe`, the model from `path`, with what is frozen frozen.

    Raises:
        UsageError, SourceError: where they do not fit, in one line.
    """
    settings, task = recipe.model, recipe.data.task
    where: dict[str, Any] = {"trust_remote_code": settings.trust_remote_code}
    of_path = where | ({"revision": settings.revision} if path == settings.model_name_or_path else {})
    config = load_config(path, **of_path)
    if settings.tokenizer_name is None:
        tokenizer = load_tokenizer(path, task=task, **of_path)
    else:
        tokenizer = load_tokenizer(settings.tokenizer_name, task=task, **where)
    data = prepare_data(recipe.data, tokenizer, config, labels=kept_labels(config, task, settings))
    if data.train is None:
        raise UsageError("There are no rows to train on: give train_file, or a dataset with a train split.")
    if data.report.get("scored") and any(score != 1 for score in data.train["labels"]):
        raise UsageError(
            f"{task}: training takes each pair for one that belongs together, but some have another score than 1 "
            f"({data.report['columns']['label']!r}); leave those out."
        )
    if recipe.arguments["label_smoothing_factor"] and data.problem_type not in (None, "single_label_classification"):
        raise UsageError(f"label_smoothing_factor: a {data.problem_type} has no labels to smooth.")
    if recipe.arguments["eval_strategy"] != "no" and data.validation is None:
        raise UsageError(
            "eval_strategy is set, but there are no validation rows: give validation_file or "
            "validation_split_percentage."
        )
    model: Any = model_for(settings, path, data, config)
    new = list(model.new_weights)
    callbacks: list[TrainerCallback] = []
    if recipe.method.peft is not None:
        from .peft import adapter_options, add_adapter

        options = adapter_options(recipe.method.peft)
        model = add_adapter(model, options.pop("preset"), **options)
    else:
        callbacks = freeze(model, recipe.method.freeze, new=new)
    warn_of_router_rate(model, recipe.method.router_learning_rate, callbacks)
    return Loaded(
        tokenizer=tokenizer,
        data=data,
        model=model,
        callbacks=callbacks,
        trains=what_trains(model) | {"new": new},
        use_cache=getattr(model.config, "use_cache", None),
    )


def describe(recipe: TrainRecipe, *, overwrite: bool = False) -> dict[str, Any]:
    """What `train` would do, with nothing written: the recipe resolved, the data, and what trains. Errors as there."""
    files = files_of(recipe.output)
    args = recipe.training_arguments(files)
    early_stopping(recipe.method, args)
    _check(recipe, args)
    checkpoint = find_checkpoint(recipe, files)
    resume = checkpoint is not None and checkpoint.is_relative_to(files)
    check_free(recipe.output, [], overwrite=overwrite, resume=resume)
    told: dict[str, Any] = {"recipe": yaml.safe_load(recipe.to_yaml())}
    if recipe.model.upcycle is not None:
        plan = plan_upcycle(open_checkpoint(recipe.model.model_name_or_path, recipe.model.revision), _upcycle(recipe))
        plan.check()
        return told | {"upcycle": describe_plan(plan)}
    whole = dataclasses.replace(recipe.model, distributed=None)  # the other processes are not needed now
    loaded = load(dataclasses.replace(recipe, model=whole), recipe.model.model_name_or_path)
    if recipe.model.distributed is not None:
        planned_shares(loaded.model.config, **recipe.model.distributed)
    return told | {"trains": loaded.trains, "data": loaded.data.report}


def _upcycle(recipe: TrainRecipe) -> UpcycleRecipe:
    model = recipe.model
    base = {"base_model": model.model_name_or_path, "revision": model.revision}
    return UpcycleRecipe.from_dict({**base, **(model.upcycle or {})}, where="upcycle")


def _start(recipe: TrainRecipe, files: Path) -> str:
    """The checkpoint to begin from: as named, or the mixture made of it."""
    if recipe.model.upcycle is None:
        return recipe.model.model_name_or_path
    wanted, start = _upcycle(recipe), files / START

    def convert() -> None:
        if not (start / "config.json").is_file():
            conversion.run(wanted, start, verify=True, overwrite=False, progress=conversion.Progress())

    on_main(convert)
    return str(start)


def _trainer(
    recipe: TrainRecipe, args: TrainingArguments, loaded: Loaded, callbacks: list[TrainerCallback]
) -> MoeTrainer:
    data, method = loaded.data, recipe.method
    embeds = data.task == "sentence-embedding"
    if any(isinstance(callback, GradualUnfreezing) for callback in loaded.callbacks):
        args.ddp_find_unused_parameters = True  # what trains changes after the model is wrapped
    if embeds:
        args.label_names = ["labels"]
    try:
        return MoeTrainer(
            model=loaded.model,
            args=args,
            data_collator=data.collator,
            train_dataset=data.train,
            eval_dataset=data.validation,
            processing_class=loaded.tokenizer,
            compute_metrics=metrics_for(data.task, data),
            preprocess_logits_for_metrics=preprocess_logits_for(data.task),
            callbacks=[*loaded.callbacks, *callbacks],
            router_learning_rate=method.router_learning_rate,
            contrastive_scale=float(method.contrastive_scale) if embeds else None,
            kept=kept(recipe, data.report),
        )
    except (ValueError, RuntimeError, ImportError) as error:  # such as a reporter that is not installed
        raise UsageError(f"recipe: {' '.join(str(error).split())}") from error


def _run(trainer: MoeTrainer, loaded: Loaded, checkpoint: Path | None) -> dict[str, float]:
    """Trains, measures, and saves the model."""
    try:
        done = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except KeyError as error:  # a metric that was not looked for before
        if "metric_for_best_model" not in str(error):
            raise
        raise UsageError(" ".join(str(error.args[0]).split())) from error
    metrics = dict(done.metrics)
    if loaded.data.validation is not None:
        metrics |= _evaluated(trainer) or trainer.evaluate()
    if loaded.data.test is not None:
        trainer.compute_metrics = metrics_for(loaded.data.task, loaded.data, split="test")
        metrics |= trainer.predict(loaded.data.test).metrics or {}
    if loaded.use_cache is not None:
        loaded.model.config.use_cache = loaded.use_cache  # Trainer turned it off, which generation would notice
    trainer.save_model()
    return metrics


def _certified(start: Path) -> dict[str, Any] | None:
    """What the certificate of the mixture that training began from says; None where it was there before."""
    certificate = read_certificate(start)
    if certificate is None:
        return None
    differences = {dtype: certificate[dtype]["max_rel"] for dtype in ("float32", "float64")}
    return {"passed": certificate["passed"], "summary": explain(certificate), "max_rel": differences}


def _evaluated(trainer: MoeTrainer) -> dict[str, float]:
    """The last evaluation, if it was of the weights that are there now."""
    found = [row for row in trainer.state.log_history if row["step"] == trainer.state.global_step]
    if trainer.args.load_best_model_at_end:
        return {}
    return next(
        ({name: row[name] for name in row if name.startswith("eval_")} for row in found if "eval_loss" in row), {}
    )


def _finish(files: Path, recipe: TrainRecipe, report: dict[str, Any]) -> None:
    """Leaves in the folder what belongs to the model."""
    shutil.rmtree(files / START, ignore_errors=True)
    (files / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle
    text = json.dumps(report, indent=2, ensure_ascii=False) + os.linesep
    (files / REPORT_NAME).write_text(text, encoding="utf-8")
