"""Options that stand in several commands."""

from pathlib import Path
from typing import Annotated

import typer

Moe = Annotated[str, typer.Argument(help="Mixture, ours or one of Transformers' own: a folder or a Hub id.")]
Output = Annotated[Path, typer.Argument(help="Folder to make.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub checkpoint.")]

# Without one, the recipe's; their defaults are its own.
TopK = Annotated[int | None, typer.Option(help="Experts that each token is sent to. [default: 2]")]
Layers = Annotated[str | None, typer.Option(help="'all', 'every-2', or indices: '0,3,5'. [default: all]")]
Dtype = Annotated[str | None, typer.Option(help="Dtype of the weights written, such as 'bfloat16'.")]
Seed = Annotated[int | None, typer.Option(help="Of everything drawn at random. [default: 0]")]
RecipeShardSize = Annotated[str | None, typer.Option(help="Largest weights file. [default: 5GB]")]

ShardSize = Annotated[str, typer.Option(help="Largest weights file.")]
Manifest = Annotated[bool, typer.Option(help="Digest every file; an interrupted run then resumes.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing folder.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and its bytes; write nothing.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
