"""Several fine-tuned checkpoints of one architecture become one mixture: each gives an expert its networks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_moe.errors import CertificateError
from hf_moe.recipe import ExpertRecipe, FuseRecipe

from .certificate import certify, explain
from .checkpoint import open_checkpoint
from .conversion import Progress, write_beside, write_checkpoint
from .describe import describe_plan
from .fit import RANDOM_GATES, digest_of, fit_routers
from .fusion_plan import plan_fuse, sources_of
from .output import check_output
from .plan import Plan
from .scheme import EXACT
from .stream import pieces


@dataclass(frozen=True)
class Fused:
    """What a fusion made: where it lies, the plan it followed, how well its routers tell the experts' texts apart
    (empty where they are random), and its certificate (None if not verified)."""

    path: Path
    plan: Plan
    routing: dict[str, Any]
    certificate: dict[str, Any] | None


def fuse(
    recipe: str | os.PathLike[str] | Mapping[str, Any] | FuseRecipe,
    output: str | os.PathLike[str],
    *,
    verify: bool = True,
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Fused:
    """Fuses several checkpoints of one architecture into a Mixture-of-Experts checkpoint in the folder `output`.

    Args:
        recipe: a YAML file (mergekit's are read), or its values: the fields of `FuseRecipe`.
        output: a folder that does not exist yet.
        verify, overwrite, manifest, progress: as in `upcycle`.
        options: fields of `FuseRecipe` that win over the recipe's.

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
        CertificateError: where the result is not what was planned; nothing is left behind.
    """
    if isinstance(recipe, FuseRecipe):
        made = replace(recipe, **options)
    elif isinstance(recipe, Mapping):
        made = FuseRecipe.from_dict({**FuseRecipe.with_our_names(dict(recipe), "fuse"), **options}, where="fuse")
    else:
        made = FuseRecipe.from_yaml(Path(recipe), **options)
    return run(
        made, Path(output), verify=verify, overwrite=overwrite, manifest=manifest, progress=progress or Progress()
    )


def run(
    recipe: FuseRecipe, output: Path, *, verify: bool, overwrite: bool, progress: Progress, manifest: bool = True
) -> Fused:
    """Carries out `recipe`; arguments and errors as in `fuse`."""
    plan = plan_fuse(recipe)
    plan.check()
    sources = sources_of(plan)
    check_output(output.expanduser(), [source.origin for source in sources], plan.nbytes, overwrite)
    plan, routing = with_routers(plan, recipe, progress)
    base = sources[0]

    def finish(folder: Path) -> None:
        plan.config.upcycled_from = base.identity
        plan.config.fused_from = [donor.source.checkpoint.identity for donor in plan.donors]
        if plan.shared_donor is not None:
            plan.config.fused_from.append({"shared": True, **plan.shared_donor.source.checkpoint.identity})
        write_beside(plan, base, _without_paths(recipe, plan), folder)

    def certified(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
        made = replace(open_checkpoint(folder), digests=digests)
        certificate = certify(base, made, plan=plan, progress=progress.stage) | {"routing": routing}
        if not certificate["weights"]["identical"] or (plan.exactness.kind == EXACT and not certificate["passed"]):
            raise CertificateError(f"{output}: the mixture is not what was planned: {explain(certificate)}")
        return certificate

    certificate = write_checkpoint(
        output,
        tensors=plan.tensors,
        pieces=lambda tensor: pieces(tensor, plan),
        sources=sources,
        recipe=recipe,
        finish=finish,
        certified=certified if verify else None,
        overwrite=overwrite,
        progress=progress,
        manifest=manifest,
        fitted=digest_of(plan.routers),
    )
    return Fused(output, plan, routing, certificate)


def describe_fusion(plan: Plan, recipe: FuseRecipe) -> dict[str, Any]:
    """As `describe_plan`, with what is fused."""
    described = describe_plan(plan)
    if plan.problems:
        return described
    experts = [donor.source.checkpoint.source for donor in plan.donors]
    return {**described, "experts": experts, "gate": recipe.gate_mode, "rest": recipe.rest}


def with_routers(plan: Plan, recipe: FuseRecipe, progress: Progress) -> tuple[Plan, dict[str, Any]]:
    """The plan with routers fitted and trained as `recipe` says, and a report on them."""
    routing: dict[str, Any] = {}
    if recipe.gate_mode not in RANDOM_GATES:
        progress.stage("fitting the routers")
        routers, routing = fit_routers(plan, recipe)
        plan = replace(plan, routers=routers, notes=(*plan.notes, *routing["notes"]))
    if recipe.train_router:
        from .tune import train_routers  # Trainer takes seconds to import

        progress.stage("training the routers")
        routers, training = train_routers(plan, recipe)
        plan, routing = replace(plan, routers=routers), {**routing, "training": training}
    return plan, routing


def _without_paths(recipe: FuseRecipe, plan: Plan) -> FuseRecipe:
    """With names for paths, as the folder may be published; digests are in config.json."""

    def named(expert: ExpertRecipe, donor: Plan) -> ExpertRecipe:
        found = donor.source.checkpoint
        texts = expert.texts and Path(expert.texts).name
        return replace(expert, source_model=found.source, revision=found.revision, texts=texts)

    shared = recipe.shared_experts and [named(recipe.shared_experts[0], plan.shared_donor or plan)]
    return replace(
        recipe,
        base_model=plan.source.checkpoint.source,
        revision=plan.source.checkpoint.revision,
        experts=[named(expert, donor) for expert, donor in zip(recipe.experts, plan.donors, strict=True)],
        shared_experts=shared,
    )
