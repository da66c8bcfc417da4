"""`hf-moe evaluate`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli import show
from hf_moe.cli.options import Json, Overwrite, Quiet, Revision
from hf_moe.cli.train import tell
from hf_moe.errors import UsageError

Column = typer.Option(help="Its name, where it is not a usual one.", rich_help_panel="Data")


def evaluate(
    ctx: typer.Context,
    models: Annotated[
        list[str], typer.Argument(help="Models: folders or Hub ids. Others are held against the first.")
    ],
    task: Annotated[
        str | None,
        typer.Option(
            help="'masked-lm', 'causal-lm', 'text-classification', 'token-classification', 'question-answering' or "
            "'sentence-embedding'."
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="File of rows: .txt, .jsonl, .json, .csv, .tsv, .parquet or .conll; may be given again."),
    ] = None,
    dataset_name: Annotated[
        str | None, typer.Option(help="Or a dataset of the Hub, or a folder that holds one.", rich_help_panel="Data")
    ] = None,
    dataset_config_name: Annotated[str | None, typer.Option(help="Its configuration.", rich_help_panel="Data")] = None,
    dataset_revision: Annotated[
        str | None, typer.Option(help="Its branch, tag or commit.", rich_help_panel="Data")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Its split. [default: test]", rich_help_panel="Data")] = None,
    text_column: Annotated[str | None, Column] = None,
    text_pair_column: Annotated[str | None, Column] = None,
    negative_column: Annotated[str | None, Column] = None,
    label_column: Annotated[str | None, Column] = None,
    question_column: Annotated[str | None, Column] = None,
    context_column: Annotated[str | None, Column] = None,
    answers_column: Annotated[str | None, Column] = None,
    sample_by: Annotated[
        str, typer.Option(help="A text of a .txt file: 'line', 'paragraph' or 'document'.", rich_help_panel="Data")
    ] = "line",
    problem_type: Annotated[
        str | None,
        typer.Option(
            help="'single_label_classification', 'multi_label_classification' or 'regression'. [default: the model's]",
            rich_help_panel="Data",
        ),
    ] = None,
    max_eval_samples: Annotated[
        int | None, typer.Option(help="The first so many rows.", rich_help_panel="Data")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(help="Tokens of a row. [default: the model's, at most 512]", rich_help_panel="Data"),
    ] = None,
    truncation: Annotated[
        str, typer.Option(help="Longer rows: 'truncate' or 'refuse'.", rich_help_panel="Data")
    ] = "truncate",
    packing: Annotated[
        bool, typer.Option("--packing", help="Fill rows with several texts.", rich_help_panel="Data")
    ] = False,
    document_masking: Annotated[
        bool, typer.Option(help="Packed texts don't see each other.", rich_help_panel="Data")
    ] = True,
    mlm_probability: Annotated[
        float, typer.Option(help="Share of tokens that are masked.", rich_help_panel="Data")
    ] = 0.15,
    doc_stride: Annotated[
        int, typer.Option(help="Tokens that windows on a context overlap by.", rich_help_panel="Data")
    ] = 128,
    output: Annotated[Path | None, typer.Option(help="Folder to make, for figures, predictions and pictures.")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows at a time.")] = 8,
    dtype: Annotated[str | None, typer.Option(help="Of the weights in memory. [default: as stored]")] = None,
    resamples: Annotated[int, typer.Option(help="Of the paired bootstrap.")] = 2_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the bootstrap, and of masked tokens.")] = 0,
    revision: Revision = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with a checkpoint.")
    ] = False,
    lm_eval: Annotated[
        str | None, typer.Option(help="Tasks of the lm-eval harness, with commas between them; causal models only.")
    ] = None,
    lm_eval_include_path: Annotated[Path | None, typer.Option(help="Folder of lm-eval tasks of your own.")] = None,
    lm_eval_limit: Annotated[int | None, typer.Option(help="Examples of each lm-eval task.")] = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models at a task, and whether they differ by more than chance."""
    from accelerate import PartialState

    from hf_moe.evaluation import evaluate as run
    from hf_moe.evaluation.harness import run_harness
    from hf_moe.tasks import DataSettings

    measured = bool(data) or dataset_name is not None
    if not measured and lm_eval is None:
        raise UsageError("There is nothing to measure on; give --data FILE, --dataset-name or --lm-eval TASKS.")
    if measured and task is None:
        raise UsageError("Name what is measured by --task, such as --task token-classification.")
    if not measured and output is not None:
        raise UsageError("--output is for what is measured on --data; give that, or --json without --output.")
    tell(ctx, bars=sys.stderr.isatty() and not (quiet or json), warnings=not quiet)
    report: dict[str, Any] = {}
    path = None
    with show.Bars(enabled=not (json or quiet)) as progress:
        if lm_eval is not None:
            progress.stage("lm-eval")
            names = [name.strip() for name in lm_eval.split(",") if name.strip()]
            report["lm_eval"] = {
                model: run_harness(
                    model,
                    names,
                    include_path=None if lm_eval_include_path is None else str(lm_eval_include_path),
                    limit=lm_eval_limit,
                    batch_size=batch_size,
                    revision=revision,
                    trust_remote_code=trust_remote_code,
                )
                for model in models
            }
        if task is not None and measured:
            settings = DataSettings(
                task=task,
                test_file=[str(file) for file in data or []] or None,
                dataset_name=dataset_name,
                dataset_config_name=dataset_config_name,
                dataset_revision=dataset_revision,
                test_split=split,
                text_column=text_column,
                text_pair_column=text_pair_column,
                negative_column=negative_column,
                label_column=label_column,
                question_column=question_column,
                context_column=context_column,
                answers_column=answers_column,
                sample_by=sample_by,  # type: ignore[arg-type]
                problem_type=problem_type,  # type: ignore[arg-type]
                max_eval_samples=max_eval_samples,
                max_length=max_length,
                truncation=truncation,  # type: ignore[arg-type]
                packing=packing,
                document_masking=document_masking,
                mlm_probability=mlm_probability,
                doc_stride=doc_stride,
                seed=seed,
            )
            made = run(
                models,
                settings,
                output=output,
                batch_size=batch_size,
                dtype=dtype,
                resamples=resamples,
                seed=seed,
                revision=revision,
                trust_remote_code=trust_remote_code,
                overwrite=overwrite,
                more=report,
                progress=progress.stage,
            )
            report, path = made.report, made.path
    if not quiet and PartialState().is_main_process:
        show.evaluated(report, path, json)
