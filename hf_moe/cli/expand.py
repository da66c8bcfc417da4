"""`hf-moe expand-experts`."""

from pathlib import Path
from typing import Annotated

import typer

from hf_moe import convert
from hf_moe.cli import show


def expand_experts(
    moe: Annotated[str, typer.Argument(help="Mixture made with --expert-rank: a folder or a Hub id.")],
    output: Annotated[Path, typer.Argument(help="Folder to make.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub checkpoint.")] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file.")] = "5GB",
    manifest: Annotated[bool, typer.Option(help="Digest every file; an interrupted run then resumes.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")] = False,
) -> None:
    """Make experts that share one network (--expert-rank) into networks of their own; the function stays."""
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = convert.expand_experts(
            moe,
            output,
            revision=revision,
            max_shard_size=max_shard_size,
            manifest=manifest,
            overwrite=overwrite,
            progress=progress,
        )
    if not quiet:
        show.reduced(made, json)
