"""`hf-moe publish` and `hf-moe card`."""

import json as json_
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from huggingface_hub.utils import disable_progress_bars

from hf_moe import hub
from hf_moe.cli import show
from hf_moe.cli.options import Json, Quiet

Folder = Annotated[Path, typer.Argument(help="Folder with a model, or with single experts.")]
RepoId = Annotated[str, typer.Argument(help="OWNER/NAME on the Hub, or NAME of your own.")]
BaseModel = Annotated[
    list[str] | None,
    typer.Option(
        help="The repository of a base that was a folder: REPO, or SOURCE=REPO; 'none': leave it out of the card.",
        show_default=False,
    ),
]
Reports = Annotated[
    list[Path] | None,
    typer.Option("--report", help="Folder of a routing report or an evaluation, to go along.", show_default=False),
]


def publish(
    path: Folder,
    repo_id: RepoId,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Who sees a new repository. [default: the Hub's]")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, made where there is none. [default: main]")] = None,
    pr: Annotated[bool, typer.Option("--pr", help="As a pull request; needs no right to write.")] = False,
    tag: Annotated[
        list[str] | None, typer.Option(help="Name for the commit; several may be given.", show_default=False)
    ] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base_model: BaseModel = None,
    report: Reports = None,
    card: Annotated[bool, typer.Option(help="Make the card, from the result files.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be sent; send nothing.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Publish a model or single experts: only what is listed, checked in a clean process, in one commit."""
    if json or quiet:
        disable_progress_bars()
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = hub.publish(
            path,
            repo_id,
            private=private,
            revision=revision,
            create_pr=pr,
            dry_run=dry_run,
            commit_message=message,
            tags=tag or [],
            base_model=base_model or [],
            reports=report or [],
            card=card,
            progress=progress.stage,
        )
    if json:
        print(json_.dumps(asdict(made), indent=2, ensure_ascii=False))
    elif not quiet:
        show.published(made)


def card(path: Folder, repo_id: RepoId, base_model: BaseModel = None, report: Reports = None) -> None:
    """Print the card that `publish` would make, without what only its bases' repositories know."""
    print(hub.make_card(path, repo_id, base_model=base_model or [], reports=report or []), end="")
