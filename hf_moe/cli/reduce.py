"""The ways back: smaller mixtures, dense models, experts that are networks of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe import convert
from hf_moe.cli import show
from hf_moe.cli.options import Json, Manifest, Moe, Output, Overwrite, Quiet, Revision, ShardSize
from hf_moe.convert import Reduced


def carry_out(command: Callable[..., Reduced], /, *places: Any, json: bool, quiet: bool, **options: Any) -> None:
    """Runs what writes a checkpoint made of others, and says what it made."""
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = command(*places, progress=progress, **options)
    if not quiet:
        show.reduced(made, json)


def downcycle(
    moe: Moe,
    output: Output,
    by: Annotated[
        str, typer.Option(help="Experts that differ: 'average', 'usage' (weighted), 'best' (one of them), or 'auto'.")
    ] = "auto",
    text: Annotated[
        Path | None, typer.Option(help="File whose lines it runs on, before and after (needs the model's memory).")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hold an exact result against the mixture.")] = True,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a mixture back into a dense model: exactly while its experts are copies, else by averaging them."""
    carry_out(
        convert.downcycle,
        moe,
        output,
        by=by,
        text=text,
        verify=verify,
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


def prune(
    moe: Moe,
    output: Output,
    num_experts: Annotated[int, typer.Option(help="Experts that are left in each layer.")],
    text: Annotated[Path, typer.Option(help="File whose lines it runs on, before and after (needs its memory).")],
    by: Annotated[
        str, typer.Option(help="Keep those with the most tokens ('usage'), or the largest output ('activation').")
    ] = "usage",
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Keep of each layer the experts that matter most on a text."""
    carry_out(
        convert.prune,
        moe,
        output,
        num_experts=num_experts,
        by=by,
        text=text,
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


def merge_experts(
    moe: Moe,
    output: Output,
    num_experts: Annotated[int, typer.Option(help="Experts that are left in each layer.")],
    text: Annotated[
        Path | None, typer.Option(help="File whose lines it runs on, before and after (needs the model's memory).")
    ] = None,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Average the experts of each layer that are most alike, their neurons aligned."""
    carry_out(
        convert.merge_experts,
        moe,
        output,
        num_experts=num_experts,
        text=text,
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


def expand_experts(
    moe: Annotated[str, typer.Argument(help="Mixture made with --expert-rank: a folder or a Hub id.")],
    output: Output,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make experts that share one network (--expert-rank) into networks of their own; the function stays."""
    carry_out(
        convert.expand_experts,
        moe,
        output,
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )
