"""A task's model and tokenizer, ours, Transformers' own mixtures and dense ones alike."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.convert.checkpoint import VOCABULARIES
from hf_moe.convert.quiet import quiet
from hf_moe.errors import HfMoeError, SourceError, UsageError

from .prepare import find_task
from .table import TASKS

Path = str | os.PathLike[str]


def load_config(path: Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """Raises SourceError in one line where there is none that works."""
    if (pathlib.Path(path) / "adapter_config.json").is_file():
        raise SourceError(f"{path}: holds a PEFT adapter; merge it into its base model first (merge_and_unload).")
    return _loaded(
        path, "configuration", AutoConfig.from_pretrained, revision=revision, trust_remote_code=trust_remote_code
    )


def load_tokenizer(
    path: Path, *, task: str | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer. One without a padding token pads with its end of text; for token classification,
    one that joins words to blanks reads single words as if a blank stood before.

    Raises:
        SourceError: where there is none that works.
    """
    folder = pathlib.Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise SourceError(f"{path}: has no tokenizer.")  # Transformers would make one of no words
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = _loaded(path, "tokenizer", AutoTokenizer.from_pretrained, **options)
    if task == "token-classification" and getattr(tokenizer, "add_prefix_space", None) is False:
        tokenizer = _loaded(path, "tokenizer", AutoTokenizer.from_pretrained, add_prefix_space=True, **options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise SourceError(f"{path}: its tokenizer has neither a padding token nor an end of text.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    task: str,
    path: Path,
    *,
    labels: Sequence[str] | None = None,
    problem_type: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    ignore_mismatched_sizes: bool = False,
    from_scratch: bool = False,
    config_overrides: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A checkpoint with the head of a task. Weights that the checkpoint lacks are new: their names are kept as
    `model.new_weights`.

    Args:
        labels: of a classification; by default those of the checkpoint.
        problem_type: of a text classification.
        ignore_mismatched_sizes: whether a head of another size is made anew.
        from_scratch: whether weights are drawn by the configuration, and none are read.
        config_overrides: fields of the configuration that are set before the model is built.
        kwargs: for `from_pretrained`, such as `dtype`.

    Raises:
        UsageError: where the architecture has no such head, or the head of the checkpoint has other labels' number.
        SourceError: where the checkpoint can't be loaded.
    """
    auto_class = getattr(transformers, find_task(task).auto_class)
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    _check_head(task, auto_class, config, path, trust_remote_code)
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    elif problem_type == "regression":
        config.num_labels = 1
    if problem_type is not None:
        config.problem_type = problem_type  # type: ignore[assignment]
    for name, value in (config_overrides or {}).items():
        setattr(config, name, value)
    if getattr(config, "pad_token_id", None) is None and isinstance(getattr(config, "eos_token_id", None), int):
        config.pad_token_id = config.eos_token_id  # as `load_tokenizer` does; a classifier looks for the last token
    if from_scratch:
        return _drawn(path, auto_class, config, trust_remote_code=trust_remote_code, **kwargs)
    model, info = _loaded(
        path,
        "model",
        auto_class.from_pretrained,
        config=config,
        revision=revision,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
        **kwargs,
    )
    model.new_weights = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    return model


def _drawn(path: Path, auto_class: Any, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model of `config` with new weights; `new_weights` names them all."""
    if options.get("dtype") == "auto":
        del options["dtype"]  # nothing is stored that could say it
    model = _loaded(path, "configuration", lambda _, **given: auto_class.from_config(config, **given), **options)
    model.new_weights = sorted(name for name, _ in model.named_parameters())
    return model


def _check_head(task: str, auto_class: Any, config: PretrainedConfig, path: Path, trust_remote_code: bool) -> None:
    remote = trust_remote_code and auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if remote or type(config) in auto_class._model_mapping:
        return
    can = [
        name for name, other in TASKS.items() if type(config) in getattr(transformers, other.auto_class)._model_mapping
    ]
    raise UsageError(
        f"{path}: is of type {config.model_type!r}, which has no head for {task}; it has {', '.join(can) or 'none'}."
    )


def _loaded(path: Path, what: str, load: Any, **options: Any) -> Any:
    try:
        with quiet():
            return load(os.fspath(path), **options)
    except HfMoeError:
        raise
    except Exception as error:  # loaders raise anything
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise SourceError(f"{path}: its {what} does not load ({reason}).") from error
