"""The commands of `hf-moe`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from hf_moe.cli import show
from hf_moe.cli.cross_validate import cv
from hf_moe.cli.evaluate import evaluate
from hf_moe.cli.experts import experts
from hf_moe.cli.options import (
    DryRun,
    Dtype,
    Json,
    Layers,
    Manifest,
    Moe,
    Output,
    Overwrite,
    Quiet,
    RecipeShardSize,
    Revision,
    Seed,
    TopK,
)
from hf_moe.cli.publish import card, publish
from hf_moe.cli.reduce import downcycle, expand_experts, merge_experts, prune
from hf_moe.cli.spread import SpreadCommand, named_files
from hf_moe.cli.train import recipes, train
from hf_moe.convert import certify, conversion, fusion, open_checkpoint, plan_upcycle, write_certificate
from hf_moe.convert.describe import describe_checkpoint, describe_plan
from hf_moe.convert.fusion_plan import plan_fuse
from hf_moe.convert.observe import observe
from hf_moe.convert.texts import read_texts
from hf_moe.convert.weights import check_mixture
from hf_moe.recipe import FuseRecipe, UpcycleRecipe
from hf_moe.version import __version__

app = typer.Typer(
    name="hf-moe",
    help="Turns dense Transformers checkpoints into Mixture-of-Experts models that start as the same function.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"hf-moe {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: hf-moe upcycle ./bert-base ./bert-moe --num-experts 8 --top-k 2 --layers every-2")
def upcycle(
    source: Annotated[str, typer.Argument(help="Dense checkpoint: folder, GGUF file, Hub id, or recipe (FILE.yaml).")],
    output: Output,
    num_experts: Annotated[int | None, typer.Option(help="Experts a layer. [default: 8]")] = None,
    top_k: TopK = None,
    layers: Layers = None,
    method: Annotated[
        str | None, typer.Option(help="'copy' of the whole network, or 'split' into parts. [default: copy]")
    ] = None,
    granularity: Annotated[
        int | None, typer.Option(help="Into how many experts each copy is cut. [default: 1]")
    ] = None,
    shared_width: Annotated[
        int | None, typer.Option(help="How many of the network's neurons become a shared expert. [default: 0]")
    ] = None,
    shared_weight: Annotated[
        float | None, typer.Option(help="Or: the whole network is a shared expert of this weight.")
    ] = None,
    expert_rank: Annotated[
        int | None, typer.Option(help="Experts share one network and differ by matrices of this rank. [default: 0]")
    ] = None,
    partition: Annotated[
        str | None, typer.Option(help="Cut by 'random', 'kmeans' or 'coactivation'. [default: random]")
    ] = None,
    calibration: Annotated[str | None, typer.Option(help="File of text, for 'coactivation'.")] = None,
    drop_ratio: Annotated[
        float | None, typer.Option(help="Share of each expert's neurons that start anew. [default: 0]")
    ] = None,
    noise_std: Annotated[
        float | None, typer.Option(help="Noise on the experts, in units of each matrix's own deviation. [default: 0]")
    ] = None,
    router_logit_std: Annotated[
        float | None, typer.Option(help="Deviation that the router's logits start with. [default: 0.1]")
    ] = None,
    norm_topk_prob: Annotated[
        bool | None, typer.Option(help="Rescale the chosen gates to sum to 1. [default: yes]", show_default=False)
    ] = None,
    router_type: Annotated[
        str | None,
        typer.Option(
            help="'softmax', 'sigmoid', 'noisy', 'top_p', 'expert_choice' or 'laplace'. [default: softmax]",
        ),
    ] = None,
    router_init: Annotated[str | None, typer.Option(help="'auto', 'normal' or 'zero'. [default: auto]")] = None,
    target: Annotated[
        str | None, typer.Option(help="Classes to write: 'hf_moe', 'native' or 'auto'. [default: hf_moe]")
    ] = None,
    dtype: Dtype = None,
    seed: Seed = None,
    max_shard_size: RecipeShardSize = None,
    revision: Revision = None,
    allow_nonfinite: Annotated[
        bool | None, typer.Option("--allow-nonfinite", help="Convert NaN and Inf as they are.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hold the result against the dense model.")] = True,
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn a dense checkpoint into a mixture of experts that computes the same function."""
    options = {
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "moe_layers": layers,
        "method": method,
        "granularity": granularity,
        "shared_expert_intermediate_size": shared_width,
        "shared_expert_weight": shared_weight,
        "expert_rank": expert_rank,
        "partition": partition,
        "calibration": calibration,
        "drop_ratio": drop_ratio,
        "noise_std": noise_std,
        "router_logit_std": router_logit_std,
        "norm_topk_prob": norm_topk_prob,
        "router_type": router_type,
        "router_init": router_init,
        "target": target,
        "dtype": dtype,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "revision": revision,
        "allow_nonfinite": allow_nonfinite,
    }
    recipe = _recipe(source, {name: value for name, value in options.items() if value is not None})
    if dry_run:
        plan = plan_upcycle(open_checkpoint(recipe.base_model, recipe.revision), recipe)
        if not quiet:
            show.fields(describe_plan(plan), json)
        plan.check()
        return
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = conversion.run(recipe, output, verify=verify, overwrite=overwrite, manifest=manifest, progress=progress)
    if not quiet:
        show.upcycled(describe_plan(made.plan) | {"output": str(output)}, made.certificate, json)


def _recipe(source: str, options: dict[str, Any]) -> UpcycleRecipe:
    if source.endswith((".yaml", ".yml")):
        return UpcycleRecipe.from_yaml(Path(source), **options)
    return UpcycleRecipe.from_dict({"base_model": source, **options}, where="upcycle")


@app.command(epilog="Example: hf-moe fuse recipe.yaml ./moe --gate-mode lda")
def fuse(
    recipe: Annotated[Path, typer.Argument(help="What to fuse, in YAML; mergekit's recipes are read.")],
    output: Output,
    gate_mode: Annotated[
        str | None,
        typer.Option(
            help="How routers start: 'hidden', 'cheap_embed', 'centroid', 'lda', 'probe', 'random' or "
            "'uniform_random'. [default: hidden]"
        ),
    ] = None,
    top_k: TopK = None,
    layers: Layers = None,
    rest: Annotated[
        str | None, typer.Option(help="Everything but the experts is the 'base' or their 'average'. [default: base]")
    ] = None,
    router_logit_std: Annotated[
        float | None, typer.Option(help="Deviation of a token's logits. [default: 1; random ones 0.1]")
    ] = None,
    train_router: Annotated[
        int | None, typer.Option(help="Train the routers on the texts for so many steps. [default: 0]")
    ] = None,
    dtype: Dtype = None,
    seed: Seed = None,
    max_shard_size: RecipeShardSize = None,
    allow_nonfinite: Annotated[
        bool | None, typer.Option("--allow-nonfinite", help="Take NaN and Inf as they are.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Hold the result against what it is made of.")] = True,
    manifest: Manifest = True,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fuse several fine-tuned checkpoints of one architecture into a mixture whose experts they are."""
    options = {
        "gate_mode": gate_mode,
        "num_experts_per_tok": top_k,
        "moe_layers": layers,
        "rest": rest,
        "router_logit_std": router_logit_std,
        "train_router": train_router,
        "dtype": dtype,
        "seed": seed,
        "max_shard_size": max_shard_size,
        "allow_nonfinite": allow_nonfinite,
    }
    wanted = FuseRecipe.from_yaml(recipe, **{name: value for name, value in options.items() if value is not None})
    if dry_run:
        plan = plan_fuse(wanted)
        if not quiet:
            show.fields(fusion.describe_fusion(plan, wanted), json)
        plan.check()
        return
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = fusion.run(wanted, output, verify=verify, overwrite=overwrite, manifest=manifest, progress=progress)
    if not quiet:
        described = fusion.describe_fusion(made.plan, wanted) | {"output": str(output)}
        show.fused(described, made.routing, made.certificate, json)


@app.command(epilog="Example: hf-moe inspect ./bert-moe --json")
def inspect(
    path: Annotated[str, typer.Argument(help="Checkpoint: a folder, a GGUF file or a Hub id.")],
    json: Json = False,
) -> None:
    """Say what a checkpoint is: family, layers, parameters, experts, certificate."""
    show.fields(describe_checkpoint(open_checkpoint(path)), json)


@app.command(epilog="Example: hf-moe verify ./bert-base ./bert-moe")
def verify(
    dense: Annotated[
        str,
        typer.Argument(help="Dense checkpoint: a folder, a GGUF file or a Hub id; or a fusion's recipe (FILE.yaml)."),
    ],
    moe: Annotated[str, typer.Argument(help="The mixture made from it: a folder or a Hub id.")],
    text: Annotated[
        Path | None, typer.Option(help="File whose lines are compared on, instead of the built-in ones.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            min=0.0, max=1.0, help="Allowed relative difference; writes no certificate. [default: 1e-6 and 1e-12]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of the random ids.")] = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure how far a mixture is from its dense model, write certificate.json, and fail beyond the tolerance."""
    moe_checkpoint, plan = open_checkpoint(moe), None
    if dense.endswith((".yaml", ".yml")):
        plan = plan_fuse(FuseRecipe.from_yaml(Path(dense)))
        plan.check()
        check_mixture(plan.source.checkpoint, moe_checkpoint, plan)
    dense_checkpoint = open_checkpoint(dense) if plan is None else plan.source.checkpoint
    with show.Bars(enabled=not (json or quiet)) as progress:
        certificate = certify(
            dense_checkpoint,
            moe_checkpoint,
            plan=plan,
            texts=None if text is None else read_texts(text),
            tolerance=None if tolerance is None else {"float32": tolerance, "float64": tolerance},
            seed=seed,
            progress=progress.stage,
        )
    if moe_checkpoint.revision is None and tolerance is None:  # a laxer verdict is for the eye, not for the record
        write_certificate(certificate, moe_checkpoint.path)
    if not quiet:
        show.certificate(certificate, json)
    if not certificate["passed"]:
        raise typer.Exit(1)


app.command(epilog="Example: hf-moe downcycle ./bert-moe ./bert-again --text text.txt")(downcycle)
app.command(epilog="Example: hf-moe prune ./moe ./smaller --num-experts 4 --by activation --text text.txt")(prune)
app.command(epilog="Example: hf-moe merge-experts ./moe ./smaller --num-experts 4 --text text.txt")(merge_experts)


@app.command(
    cls=SpreadCommand, epilog="Example: hf-moe routing ./moe --data text.txt --domains law=law.txt pets=pets.txt"
)
def routing(
    moe: Moe,
    data: Annotated[
        list[Path] | None,
        typer.Option(help="Files of text, a passage a line; several may follow.", show_default=False),
    ] = None,
    domains: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: texts of one subject, to be told apart; two or more.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to make. [default: the mixture's name and '-routing']")
    ] = None,
    revision: Revision = None,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show how a mixture routes text: figures, plots, and a page to look at."""
    with show.Bars(enabled=not (json or quiet)) as progress:
        made = observe(
            moe,
            output,
            data=data or [],
            domains=named_files(domains or []),
            revision=revision,
            overwrite=overwrite,
            progress=progress,
        )
    if not quiet:
        show.observed(made, json)


app.command(epilog="Example: hf-moe evaluate ./dense ./moe --task token-classification --data test.conll")(evaluate)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: hf-moe train recipe.yaml --learning_rate 1e-4 --freeze experts_only",
)(train)
app.command(epilog="Example: hf-moe recipes")(recipes)
app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    epilog="Example: hf-moe cv recipe.yaml --folds 5 --group-col author --output_dir ./cv",
)(cv)
app.command(epilog="Example: hf-moe expand-experts ./low-rank ./moe")(expand_experts)
app.command(
    epilog="Example: hf-moe publish ./bert-moe me/bert-moe --private --base-model google-bert/bert-base-uncased"
)(publish)
app.command(epilog="Example: hf-moe card ./bert-moe me/bert-moe --base-model google-bert/bert-base-uncased")(card)
app.add_typer(experts)
