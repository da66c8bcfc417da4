"""From a dense checkpoint to a mixture on disk: open, plan, write, certify, rename."""

import difflib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hf_moe.errors import CertificateError, UsageError
from hf_moe.modeling import dense_type
from hf_moe.modeling.configuration_moe import MoeConfigMixin
from hf_moe.recipe import UpcycleRecipe

from .calibrate import coactivation, write_deals
from .certificate import certify, explain, write_certificate
from .checkpoint import Checkpoint, open_checkpoint, read_json
from .classes import find_family
from .manifest import write_manifest
from .output import check_output, whole_folder
from .plan import Plan, TensorPlan, plan_upcycle
from .scheme import EXACT
from .stream import pieces
from .writer import Pieces, file_bytes, split, write_weights

RECIPE_NAME = "recipe.yaml"
TOKENIZER_CONFIG = "tokenizer_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
OF_LOADING = ("dtype", "target")  # what `from_dense` leaves to `from_pretrained`, or to the class it is called on


class Progress:
    """Told what happens; this one tells nobody. The command line draws bars from it."""

    def stage(self, name: str) -> None:
        """A new stage begins."""

    def total(self, nbytes: int) -> None:
        """This many bytes will be written."""

    def wrote(self, nbytes: int) -> None:
        """This many more bytes are written."""


@dataclass(frozen=True)
class Upcycled:
    """What a conversion made: where it lies, the plan it followed, and its certificate (None if not verified)."""

    path: Path
    plan: Plan
    certificate: dict[str, Any] | None


def upcycle(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    verify: bool = True,
    overwrite: bool = False,
    manifest: bool = True,
    progress: Progress | None = None,
    **options: Any,
) -> Upcycled:
    """Turns the dense checkpoint `source` into a Mixture-of-Experts checkpoint in the folder `output`.

    Args:
        source: a folder, a GGUF file or a Hub id.
        output: a folder that does not exist yet.
        verify: whether the result is held against `source` before it takes its place.
        overwrite: whether an existing `output` is replaced, once the new one is whole.
        manifest: whether `manifest.json` is written; without it an interrupted run starts anew.
        progress: is told what happens.
        options: the fields of `UpcycleRecipe`: `num_experts`, `num_experts_per_tok`, `moe_layers`, …

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
        CertificateError: where the result is not the function it should be; nothing is left behind.
    """
    recipe = UpcycleRecipe.from_dict({"base_model": str(source), **options}, where="upcycle")
    return run(
        recipe, Path(output), verify=verify, overwrite=overwrite, progress=progress or Progress(), manifest=manifest
    )


def run(
    recipe: UpcycleRecipe, output: Path, *, verify: bool, overwrite: bool, progress: Progress, manifest: bool = True
) -> Upcycled:
    """Carries out `recipe`; arguments and errors as in `upcycle`."""
    progress.stage("reading")
    checkpoint = open_checkpoint(recipe.base_model, recipe.revision)
    plan = plan_upcycle(checkpoint, recipe)
    plan.check()
    if recipe.partition == "coactivation":
        check_output(output.expanduser(), [checkpoint.origin], plan.nbytes, overwrite)
        plan.features.update(coactivation(plan))

    def finish(folder: Path) -> None:
        _write_beside(plan, checkpoint, folder)
        if plan.features:
            write_deals(plan, folder)

    def certified(folder: Path, digests: dict[str, str]) -> dict[str, Any]:
        made = replace(open_checkpoint(folder), digests=digests)
        certificate = certify(checkpoint, made, plan=plan, progress=progress.stage)
        if plan.exactness.kind == EXACT and not certificate["passed"]:
            raise CertificateError(
                f"{recipe.base_model}: the mixture is not the dense function: {explain(certificate)}"
            )
        return certificate

    certificate = write_checkpoint(
        output,
        tensors=plan.tensors,
        pieces=lambda tensor: pieces(tensor, plan),
        sources=[checkpoint],
        recipe=recipe,
        finish=finish,
        certified=certified if verify else None,
        overwrite=overwrite,
        progress=progress,
        manifest=manifest,
    )
    return Upcycled(output, plan, certificate)


def write_checkpoint(
    output: Path,
    *,
    tensors: Sequence[TensorPlan],
    pieces: Pieces,
    sources: list[Checkpoint],
    recipe: Any,
    finish: Callable[[Path], None],
    certified: Callable[[Path, dict[str, str]], dict[str, Any]] | None,
    overwrite: bool,
    progress: Progress,
    manifest: bool = True,
    fitted: str = "",
) -> dict[str, Any] | None:
    """Writes a checkpoint that becomes `output` when it is whole; what an interrupted run has written is taken over.

    Args:
        tensors, pieces: what is written, and what makes the values of each.
        sources: the checkpoints that `pieces` reads.
        recipe: what it follows, a dataclass with a `max_shard_size`; with `sources` and versions it decides what an
            earlier run's work is worth.
        finish: writes what stands beside the weights into the folder.
        certified: measures the folder (given the digests of its files), and raises where it is not what it should be.
        overwrite, progress: as in `upcycle`.
        manifest: whether files are digested; without it nothing can be resumed.
        fitted: digest of what `pieces` draws on besides sources and recipe.

    Returns:
        the certificate, if there is one. Errors as in `upcycle`.
    """
    output = output.expanduser()
    shards = split(tensors, recipe.max_shard_size)
    nbytes = sum(file_bytes(held) for held in shards.values())
    check_output(output, [source.origin for source in sources], nbytes, overwrite)
    with whole_folder(output, _fingerprint(shards, sources, recipe, fitted), overwrite) as (folder, journal):
        progress.stage("writing")
        progress.total(nbytes)
        with ThreadPoolExecutor(1) as background:
            digests_of_sources = [background.submit(getattr, source, "sha256") for source in sources]
            digests = write_weights(
                shards,
                pieces,
                folder,
                marks=journal.marks,
                mark=journal.mark if manifest else None,
                progress=progress.wrote,
            )
            for future in digests_of_sources:
                future.result()
        finish(folder)
        certificate = None
        if certified is not None:
            certificate = certified(folder, digests)
            write_certificate(certificate, folder)
        for source in sources:
            source.check_unchanged()
        if manifest:
            write_manifest(folder, [source.identity for source in sources], digests)
    return certificate


def _fingerprint(shards: dict[str, list[TensorPlan]], sources: list[Checkpoint], recipe: Any, fitted: str) -> str:
    """Of everything that decides which bytes are written."""
    values = {
        "shards": {file: [asdict(tensor) for tensor in tensors] for file, tensors in shards.items()},
        "sources": [[source.source, source.stamps] for source in sources],
        "recipe": asdict(recipe),
        "fitted": fitted,
        "versions": {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers")},
    }
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def _write_beside(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    # the source's name, not its path: the folder may be published, and its digest is in config.json
    calibration = plan.recipe.calibration and Path(plan.recipe.calibration).name
    recipe = replace(plan.recipe, base_model=checkpoint.source, revision=checkpoint.revision, calibration=calibration)
    plan.config.upcycled_from = {**checkpoint.identity, "recipe": recipe.changed()}
    write_beside(plan, checkpoint, recipe, folder)


def write_beside(plan: Plan, checkpoint: Checkpoint, recipe: Any, folder: Path) -> None:
    """Configuration, code, `recipe`, and what comes along from `checkpoint`."""
    write_config(plan.config, checkpoint, plan.family.model_type, folder)
    (folder / RECIPE_NAME).write_text(recipe.to_yaml(), encoding="utf-8")


def write_config(config: PretrainedConfig, checkpoint: Checkpoint, model_type: str, folder: Path) -> None:
    """Configuration and code; tokenizer, processors, generation configuration and licence as `checkpoint` has them.

    What says nowhere which tokenizer or processor it is gets the one of `model_type`.
    """
    config.to_json_file(folder / "config.json")
    if isinstance(config, MoeConfigMixin):
        config.save_code(folder)
    for file in checkpoint.side_files:
        shutil.copyfile(file, folder / file.name)
    if checkpoint.has_tokenizer:
        _name_class(folder / TOKENIZER_CONFIG, {"tokenizer_class": _tokenizer_class(model_type)})
    if (folder / PREPROCESSOR_CONFIG).is_file():
        _name_class(folder / PREPROCESSOR_CONFIG, _preprocessor_class(model_type))


def _name_class(file: Path, names: dict[str, str]) -> None:
    """Writes a class down where the source left it to its `model_type`, which the mixture changes."""
    values = read_json(file) if file.is_file() else {}
    if not values.keys() & {"tokenizer_class", "image_processor_type", "feature_extractor_type"}:
        file.write_text(json.dumps({**values, **names}, indent=2) + "\n", encoding="utf-8")


def _tokenizer_class(model_type: str) -> str:
    config_class = transformers.CONFIG_MAPPING[model_type]
    tokenizer_class: Any = transformers.TOKENIZER_MAPPING.get(config_class, transformers.PreTrainedTokenizerFast)
    if isinstance(tokenizer_class, tuple):
        tokenizer_class = next(cls for cls in reversed(tokenizer_class) if cls is not None)
    return tokenizer_class.__name__.removesuffix("Fast")


def _preprocessor_class(model_type: str) -> dict[str, str]:
    """By names: the classes themselves want libraries of their own, torchvision say."""
    if model_type in IMAGE_PROCESSOR_MAPPING_NAMES:
        return {"image_processor_type": IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["torchvision"]}
    if model_type in FEATURE_EXTRACTOR_MAPPING_NAMES:
        return {"feature_extractor_type": FEATURE_EXTRACTOR_MAPPING_NAMES[model_type]}
    return {}


def from_dense(cls: type[PreTrainedModel], source: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A mixture of class `cls`, in memory, from the dense checkpoint `source`.

    A head that `source` lacks is initialised at random, as `from_pretrained` would. For a checkpoint on disk with a
    certificate, use `upcycle`.

    Args:
        source: a folder, a GGUF file or a Hub id.
        options: the fields of `UpcycleRecipe` (`num_experts`, …); all others go to `from_pretrained` (`dtype`,
            `num_labels`, …).

    Raises:
        UsageError, SourceError, OutputError: as in `upcycle`.
    """
    names = [field.name for field in fields(UpcycleRecipe) if field.name not in OF_LOADING]
    recipe = {name: value for name, value in options.items() if name in names}
    loading = {name: value for name, value in options.items() if name not in names}
    for name in loading:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.9):
            raise UsageError(f"from_dense: unknown option {name!r}; did you mean {close[0]!r}?")
    family = find_family(open_checkpoint(source, options.get("revision")))
    wanted = dense_type(cls.config_class)  # type: ignore[arg-type]
    if family.model_type != wanted:
        raise UsageError(f"{source}: is a {family.model_type}; {cls.__name__} is made from a {wanted}.")
    with tempfile.TemporaryDirectory(prefix="hf_moe.") as folder:
        made = upcycle(source, Path(folder) / "moe", verify=False, manifest=False, **recipe)
        model = cls.from_pretrained(made.path, **loading)
    model.config._name_or_path = model.name_or_path = str(source)
    return model
