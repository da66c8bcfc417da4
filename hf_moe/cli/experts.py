"""`hf-moe experts …`: single experts, taken out of a mixture and put into another."""

from typing import Annotated

import typer

from hf_moe import convert
from hf_moe.cli import show
from hf_moe.cli.options import Json, Manifest, Moe, Output, Overwrite, Quiet, Revision, ShardSize
from hf_moe.cli.reduce import carry_out
from hf_moe.cli.spread import SpreadCommand, named_files
from hf_moe.hub import export as exporting
from hf_moe.hub.assemble import compose as compose_experts
from hf_moe.hub.encodings import How
from hf_moe.hub.pull import pull as pull_experts
from hf_moe.hub.select import parse_choices, parse_indices, parse_spec, parse_specs

experts = typer.Typer(name="experts", help="Single experts: compare, take out, fetch, put in.", no_args_is_help=True)

Base = Annotated[str, typer.Argument(help="The mixture before: a folder or a Hub id.")]
Tuned = Annotated[str, typer.Argument(help="The same after training: a folder or a Hub id.")]
BaseRevision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the base.")]


@experts.command(epilog="Example: hf-moe experts diff ./moe ./moe-law --json")
def diff(
    base: Base, tuned: Tuned, base_revision: BaseRevision = None, revision: Revision = None, json: Json = False
) -> None:
    """Say which experts, routers and other tensors changed, and by how much."""
    found = exporting.diff(base, tuned, base_revision=base_revision, revision=revision)
    show.fields(found.describe(), json)


@experts.command(epilog="Example: hf-moe experts export ./moe ./moe-law ./law --as xor")
def export(
    base: Base,
    tuned: Tuned,
    output: Output,
    experts: Annotated[
        list[str] | None,
        typer.Option(help="LAYER.EXPERT, as 0.3,1.* or 0.shared. [default: all that changed]", show_default=False),
    ] = None,
    how: Annotated[
        str, typer.Option("--as", help="'full' and 'xor' (exact), 'delta' (bfloat16), 'low-rank' or 'sparse'.")
    ] = "full",
    rank: Annotated[int | None, typer.Option(help="Of low-rank: of each difference.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Of low-rank: the rank that leaves at most this share of the change out.")
    ] = None,
    density: Annotated[float, typer.Option(help="Of sparse: share of the values that are kept.")] = 0.1,
    leave_others: Annotated[
        bool, typer.Option("--leave-others", help="Leave behind what changed outside of experts and routers.")
    ] = False,
    base_revision: BaseRevision = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the experts that changed, with their rows of the routers, so that AutoModel opens them over the base."""
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = exporting.export(
            base,
            tuned,
            output,
            experts=parse_choices(experts or []),
            how=How(kind=how, rank=rank, max_error=max_error, density=density),
            leave_others=leave_others,
            base_revision=base_revision,
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if not quiet:
        show.fields(_summary(made.described) | {"output": str(output)}, json)


@experts.command(epilog="Example: hf-moe experts pull me/law-experts@main#0.1 me/law-experts@main#1.3 ./law")
def pull(
    specs: Annotated[list[str], typer.Argument(help="REPO[@rev]#LAYER.EXPERT, of one repository.", metavar="SPEC…")],
    output: Output,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fetch single experts from the Hub: of the weights, only their bytes."""
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = pull_experts(parse_specs(specs), output, overwrite=overwrite, progress=progress)
    if not quiet:
        show.fields(_summary(made.described) | {"output": str(output)}, json)


@experts.command(epilog="Example: hf-moe experts apply ./moe ./law ./moe-law")
def apply(
    base: Base,
    artefacts: Annotated[list[str], typer.Argument(help="Folders or repositories with experts.", metavar="ARTEFACT…")],
    output: Output,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write the base with experts in their places: an ordinary checkpoint."""
    carry_out(
        compose_experts,
        base,
        output,
        [parse_spec(artefact) for artefact in artefacts],
        verb="apply",
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


@experts.command(
    cls=SpreadCommand,
    epilog="Example: hf-moe experts compose ./moe ./both ./law#0.1 ./pets#0.2 --router fitted --texts ./law=law.txt "
    "./pets=pets.txt",
)
def compose(
    base: Base,
    output: Output,
    specs: Annotated[
        list[str],
        typer.Argument(help="REPO[@rev] or folder, #LAYER.EXPERT, =LAYER.EXPERT for elsewhere.", metavar="SPEC…"),
    ],
    router: Annotated[
        str, typer.Option(help="Rows of the routers come 'along', stay the 'base's, or are 'fitted' to texts.")
    ] = "along",
    texts: Annotated[
        list[str] | None,
        typer.Option(
            help="Of fitted: SPEC=FILE, what a spec's experts are for, a passage a line; base=FILE for those that "
            "stay. Several may follow.",
            show_default=False,
        ),
    ] = None,
    gate_mode: Annotated[
        str | None,
        typer.Option(help="Of fitted: 'hidden', 'cheap_embed', 'centroid', 'lda' or 'probe'. [default: hidden]"),
    ] = None,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a mixture from experts of several artefacts over the base that all of them were made for."""
    carry_out(
        compose_experts,
        base,
        output,
        [parse_spec(spec) for spec in specs],
        router=router,
        texts=named_files(texts or [], "--texts", str.rpartition),
        gate_mode=gate_mode,
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


@experts.command(epilog="Example: hf-moe experts disable ./moe 0.1 2.3 ./moe-without")
def disable(
    moe: Moe,
    experts: Annotated[list[str], typer.Argument(help="LAYER.EXPERT.", metavar="LAYER.EXPERT…")],
    output: Output,
    revision: Revision = None,
    max_shard_size: ShardSize = "5GB",
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Send no token to some experts any more, exactly as if they were not there."""
    carry_out(
        convert.disable,
        moe,
        output,
        experts=parse_indices(experts),
        revision=revision,
        max_shard_size=max_shard_size,
        manifest=manifest,
        overwrite=overwrite,
        json=json,
        quiet=quiet,
    )


def _summary(described: dict) -> dict:
    keys = dict.fromkeys(f"{entry['layer']}.{entry['expert']}" for entry in described["tensors"].values())
    return {
        "base": described["base"]["repo"],
        "experts": list(keys),
        "how": described["how"],
        "error": described["error"],
        "complete": described["complete"],
        "bytes": described["bytes"],
        "times_smaller": described["smaller"],
    }
