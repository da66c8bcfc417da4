"""What the ways back from a mixture share: reading it, running it on text before and after, and writing the result.

Writing streams; measuring on text needs the memory of the model it runs.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling import modeling_module
from hf_moe.modeling.configuration_moe import MoeConfigMixin
from hf_moe.recipe import UpcycleRecipe

from .certificate import without_nan
from .checkpoint import Checkpoint, open_checkpoint
from .conversion import Progress, write_checkpoint
from .mixture import Mixture, open_mixture
from .output import check_output
from .plan import TensorPlan, check_shard_size
from .usage import Quality, Text, Usage, compare_quality, gate_sums, load_for_text, measure, open_text, quality_of
from .writer import Pieces

FORMAT = 1


@dataclass(frozen=True)
class Reduced:
    """What became of a mixture: where it lies, what was done and measured, and its certificate, if there is one."""

    path: Path
    report: dict[str, Any]
    certificate: dict[str, Any] | None = None


@dataclass(frozen=True)
class Decisions:
    """What decides the bytes written, besides the source; takes a recipe's place in `write_checkpoint`."""

    verb: str
    values: dict[str, Any]
    max_shard_size: str


@dataclass
class Job:
    """One reduction, from the mixture's opening to the report.

    Args:
        verb: what is done, which names the report's file.
        mixture: what it is done to.
        model_class: of the mixture.
        text: what it is measured on, if anything.
        before, usage: how it did there, and what its experts did.
    """

    verb: str
    mixture: Mixture
    model_class: type[PreTrainedModel]
    output: Path
    overwrite: bool
    manifest: bool
    max_shard_size: str
    progress: Progress
    text: Text | None = None
    before: Quality | None = None
    usage: Usage = field(default_factory=Usage)

    @property
    def checkpoint(self) -> Checkpoint:
        return self.mixture.checkpoint

    def run_text(self, file: Path, norms: bool = False) -> None:
        """Fills in `text`, `before` and `usage`."""
        self.text = open_text(file, self.checkpoint, self.mixture.config)
        self.progress.stage("running the text")
        model = load_for_text(self.model_class, self.checkpoint)
        self.before, self.usage = measure(model, self.mixture.layers, self.text, norms=norms)

    def weights(self, layer: int) -> torch.Tensor:
        """(E,): how many tokens each expert was sent, and one more, so that none counts nothing; or all alike."""
        counts = self.usage.counts.get(layer)
        return torch.ones(self.mixture.num_experts, dtype=torch.float64) if counts is None else counts + 1

    def scales(self, routers: dict[int, torch.Tensor], top_k: int) -> dict[int, float]:
        """Layer -> by what the experts' output is multiplied, so that it is on average what it was: gates that are not
        renormalised grow where fewer experts share the probability."""
        if self.mixture.norm_topk_prob:
            return {}
        assert self.text is not None
        self.progress.stage("running the text")
        sums = gate_sums(load_for_text(self.model_class, self.checkpoint), routers, top_k, self.text)
        return {layer: self.usage.gates[layer] / sums[layer] for layer in sums}

    def write(
        self,
        tensors: list[TensorPlan],
        pieces: Pieces,
        decisions: dict[str, Any],
        write_config: Callable[[Path], None],
        made_class: type[PreTrainedModel],
        report: dict[str, Any],
        certified: Callable[[Path, dict[str, str]], dict[str, Any]] | None = None,
    ) -> Reduced:
        """Writes the checkpoint with its report. `write_config` writes what stands beside the weights."""
        report = {
            "format": FORMAT,
            "verb": self.verb,
            "source": self.checkpoint.identity,
            "class": made_class.__name__,
            **report,
            "versions": {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers")},
        }

        def finish(folder: Path) -> None:
            write_config(folder)
            if self.text is not None and self.before is not None:
                self.progress.stage("running the text again")
                model = load_for_text(made_class, open_checkpoint(folder))
                report["text"] = {
                    "inputs": self.text.note,
                    **compare_quality(self.before, quality_of(model, self.text)),
                }
            text = json.dumps(without_nan(report), indent=2, allow_nan=False)
            (folder / f"{self.verb}.json").write_text(text + "\n", encoding="utf-8")

        certificate = write_checkpoint(
            self.output,
            tensors=tensors,
            pieces=pieces,
            sources=[self.checkpoint],
            recipe=Decisions(self.verb, decisions, self.max_shard_size),
            finish=finish,
            certified=certified,
            overwrite=self.overwrite,
            progress=self.progress,
            manifest=self.manifest,
        )
        return Reduced(self.output, without_nan(report), certificate)


def open_job(
    verb: str,
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    revision: str | None,
    overwrite: bool,
    manifest: bool,
    max_shard_size: str,
    progress: Progress | None,
) -> Job:
    """Opens `source`; what can be refused is refused before any model runs.

    Raises:
        SourceError: where it is no mixture. UsageError, OutputError: where the output can't be.
    """
    check_shard_size(max_shard_size)
    checkpoint = open_checkpoint(source, revision)
    mixture = open_mixture(checkpoint)
    check_output(Path(output).expanduser(), [checkpoint.path], 0, overwrite)
    return Job(
        verb=verb,
        mixture=mixture,
        model_class=class_of(mixture),
        output=Path(output),
        overwrite=overwrite,
        manifest=manifest,
        max_shard_size=max_shard_size,
        progress=progress or Progress(),
    )


def refuse_disabled(job: Job) -> None:
    """Raises UsageError where some experts are disabled: they would come back, or shift."""
    if getattr(job.mixture.config, "disabled_experts", None):
        raise UsageError(
            f"{job.checkpoint.path}: has disabled experts (disabled_experts in config.json), which {job.verb} would "
            "bring back; take the mixture that they were disabled in."
        )


def recorded_recipe(mixture: Mixture) -> UpcycleRecipe | None:
    """By what recipe the mixture was made of a dense network, as far as it still holds; None where nobody says.

    Raises:
        SourceError: where its configuration says something else than a recipe.
    """
    recorded = mixture.checkpoint.config.get("upcycled_from")
    if not isinstance(recorded, dict):
        return None
    recipe = recorded.get("recipe")
    values = {
        **(recipe if isinstance(recipe, dict) else {}),
        "base_model": str(recorded.get("source")),
        "num_experts": mixture.num_experts,
        "num_experts_per_tok": mixture.top_k,
        "norm_topk_prob": mixture.norm_topk_prob,
    }
    try:
        return UpcycleRecipe.from_dict(values, where="upcycled_from")
    except UsageError as error:
        raise SourceError(f"{mixture.checkpoint.path}: config.json: {error}") from error


def copy_size(mixture: Mixture) -> int:
    """How many experts in a row make one copy, which the router still takes or leaves as a whole."""
    if (tied_size := getattr(mixture.config, "router_group_size", 1)) > 1:
        return tied_size
    recipe = recorded_recipe(mixture)
    size = recipe.granularity if recipe is not None else 1
    if size < 2 or mixture.num_experts % size or mixture.top_k % size:
        return 1
    rows = [mixture.router(layer).unflatten(0, (-1, size)) for layer in mixture.layers]
    return size if all(torch.equal(tied, tied[:, :1].expand_as(tied)) for tied in rows) else 1


def class_of(mixture: Mixture) -> type[PreTrainedModel]:
    """The class that its configuration names. Raises SourceError where it is none of the architecture's."""
    config = mixture.config
    name = config.architectures[0] if config.architectures else None
    if isinstance(config, MoeConfigMixin):
        found = getattr(modeling_module(type(config)), name or config.auto_classes["AutoModel"], None)
    else:
        found = getattr(transformers, name or "", None)
    if not (isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config)):
        raise SourceError(
            f"{mixture.checkpoint.path}: config.json names the class {name!r}, which is none of a {config.model_type}."
        )
    return found
