"""What data a task runs on, and how it is cut: flat, with the names of Transformers' example scripts."""

from dataclasses import dataclass, fields
from typing import Literal

from hf_moe.errors import UsageError
from hf_moe.recipe import check_range, options_of

SPLITS = ("train", "validation", "test")
SHUFFLE_BUFFER_SIZE = 1000


@dataclass(kw_only=True)
class DataSettings:
    """Where the rows are, and how they become a model's input.

    Args:
        task: one of `TASKS`.
        train_file, validation_file, test_file: local files, their kind by their ending: .txt, .jsonl, .json, .csv,
            .tsv, .parquet or .conll (the last column the tag).
        dataset_name: instead of files, a dataset of the Hub or a local folder that `datasets.load_dataset` reads.
        dataset_config_name, dataset_revision: which of its configurations; branch, tag or commit.
        train_split, validation_split, test_split: what it calls its splits, where by other names than usual.
        sample_by: what one text of a .txt file is: a "line", a "paragraph" or the whole "document".
        text_column, text_pair_column, negative_column, label_column, question_column, context_column, answers_column:
            what the columns are called, where by other names than usual. A sentence embedding's are its anchor,
            positive and negative; token classification's text is a list of words, its label a list of tags.
        group_column: rows with the same value stay on one side where data is split.
        validation_split_percentage: of the training rows, for validation where there are no others (0: none).
        max_train_samples, max_eval_samples: the first so many rows.
        max_length: tokens of one row; by default what the model has room for, at most 512.
        truncation: whether what is longer is cut, and counted, or refused.
        packing: fill rows of `max_length` with several texts (language models).
        document_masking: no token sees another text of its row (packed causal models).
        mlm_probability: share of the tokens that a masked language model must guess.
        doc_stride: by how many tokens the windows on a long context overlap (question answering).
        streaming: read while training, for more data than fits (language models).
        shuffle_buffer_size: streamed rows held at a time, of which the next are drawn (by default 1000; 0: in the
            order of the files).
        problem_type: of a text classification, where its labels do not tell.
        seed: of the validation rows drawn, the tokens masked in evaluation, and the order of what is streamed.
    """

    task: str
    train_file: str | list[str] | None = None
    validation_file: str | list[str] | None = None
    test_file: str | list[str] | None = None
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    sample_by: Literal["line", "paragraph", "document"] = "line"
    text_column: str | None = None
    text_pair_column: str | None = None
    negative_column: str | None = None
    label_column: str | None = None
    question_column: str | None = None
    context_column: str | None = None
    answers_column: str | None = None
    group_column: str | None = None
    validation_split_percentage: float | int = 0
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    max_length: int | None = None
    truncation: Literal["truncate", "refuse"] = "truncate"
    packing: bool = False
    document_masking: bool = True
    mlm_probability: float | int = 0.15
    doc_stride: int = 128
    streaming: bool = False
    shuffle_buffer_size: int | None = None
    problem_type: Literal["single_label_classification", "multi_label_classification", "regression"] | None = None
    seed: int = 0

    def files(self, split: str) -> list[str]:
        """The files of a split, in their order."""
        given = getattr(self, f"{split}_file")
        return [given] if isinstance(given, str) else list(given or [])


def check_settings(settings: DataSettings) -> None:
    """Raises UsageError for what can't be meant, before anything is read."""
    for field in fields(DataSettings):
        options, value = options_of(field.type), getattr(settings, field.name)
        if options and value is not None and value not in options:
            raise UsageError(f"{field.name} is {value!r}; choose from {', '.join(options)}.")
    named = [split for split in SPLITS if settings.files(split)]
    if settings.dataset_name is not None and named:
        raise UsageError(f"dataset_name and {named[0]}_file are both given; leave one out.")
    if settings.dataset_name is None and not named:
        raise UsageError("There is no data: give train_file, validation_file or test_file, or dataset_name.")
    for name, low, high in (
        ("validation_split_percentage", 0, 99),
        ("mlm_probability", 0.001, 0.999),
        ("max_train_samples", 1, None),
        ("max_eval_samples", 1, None),
        ("max_length", 8, None),
        ("doc_stride", 0, None),
        ("shuffle_buffer_size", 0, None),
        ("seed", 0, 2**32 - 1),
    ):
        value = getattr(settings, name)
        if value is not None:
            check_range(name, value, low, high)
