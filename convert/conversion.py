"""From a dense checkpoint to a mixture on disk: open, plan, write, certify, rename."""

import difflib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.feature_extraction_auto import FEATURE_EXTRACTOR_MAPPING_NAMES
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from hf_moe.errors import CertificateError, UsageError
from hf_moe.recipe import UpcycleRecipe

from .certificate import certify, explain, write_certificate
from .checkpoint import Checkpoint, open_checkpoint, read_json
from .classes import find_family
from .output import check_output, whole_folder
from .plan import EXACT, Plan, plan_upcycle
from .stream import write_weights

RECIPE_NAME = "recipe.yaml"
TOKENIZER_CONFIG = "tokenizer_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"


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
    progress: Progress | None = None,
    **options: Any,
) -> Upcycled:
    """Turns the dense checkpoint `source` into a Mixture-of-Experts checkpoint in the folder `output`.

    Args:
        source: a folder or a Hub id.
        output: a folder that does not exist yet.
        verify: whether the result is held against `source` before it takes its place.
        overwrite: whether an existing `output` is replaced, once the new one is whole.
        progress: is told what happens.
        options: the fields of `UpcycleRecipe`: `num_experts`, `num_experts_per_tok`, `moe_layers`, …

    Raises:
        UsageError, SourceError, OutputError: where it can't be done, in one line; nothing is written.
        CertificateError: where the result is not the function it should be; nothing is left behind.
    """
    recipe = UpcycleRecipe.from_dict({"base_model": str(source), **options}, where="upcycle")
    return run(recipe, Path(output), verify=verify, overwrite=overwrite, progress=progress or Progress())


def run(recipe: UpcycleRecipe, output: Path, *, verify: bool, overwrite: bool, progress: Progress) -> Upcycled:
    """Carries out `recipe`; arguments and errors as in `upcycle`."""
    checkpoint = open_checkpoint(recipe.base_model, recipe.revision)
    plan = plan_upcycle(checkpoint, recipe)
    plan.check()
    output = output.expanduser()
    check_output(output, checkpoint.path, plan.nbytes, overwrite)
    certificate = None
    with whole_folder(output) as folder:
        progress.stage("writing")
        progress.total(plan.nbytes)
        write_weights(plan, checkpoint, folder, progress.wrote)
        _write_beside(plan, checkpoint, folder)
        if verify:
            certificate = certify(checkpoint, open_checkpoint(folder), progress=progress.stage)
            if plan.exactness == EXACT and not certificate["passed"]:
                raise CertificateError(
                    f"{recipe.base_model}: the mixture is not the dense function: {explain(certificate)}"
                )
            write_certificate(certificate, folder)
    return Upcycled(output, plan, certificate)


def _write_beside(plan: Plan, checkpoint: Checkpoint, folder: Path) -> None:
    """Configuration, code, recipe, and what comes along from the source."""
    assert plan.config is not None  # as in every plan without problems
    assert plan.family is not None
    plan.config.upcycled_from = {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": checkpoint.sha256,
    }
    plan.config.to_json_file(folder / "config.json")
    plan.config.save_code(folder)
    # the source's name, not its path: the folder may be published, and its digest is in config.json
    recipe = replace(plan.recipe, base_model=checkpoint.source, revision=checkpoint.revision)
    (folder / RECIPE_NAME).write_text(recipe.to_yaml(), encoding="utf-8")
    for file in checkpoint.side_files:
        shutil.copyfile(file, folder / file.name)
    model_type = plan.family.model_type
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
        source: a folder or a Hub id.
        options: the fields of `UpcycleRecipe` (`num_experts`, …); all others go to `from_pretrained` (`dtype`,
            `num_labels`, …).

    Raises:
        UsageError, SourceError, OutputError: as in `upcycle`.
    """
    names = [field.name for field in fields(UpcycleRecipe)]
    recipe = {name: value for name, value in options.items() if name in names}
    loading = {name: value for name, value in options.items() if name not in names}
    for name in loading:
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.9):
            raise UsageError(f"from_dense: unknown option {name!r}; did you mean {close[0]!r}?")
    family = find_family(open_checkpoint(source, options.get("revision")))
    wanted = cls.config_class.model_type if cls.config_class is not None else ""
    if family.config_class.model_type != wanted:
        raise UsageError(
            f"{source}: is a {family.model_type}; {cls.__name__} is made from a {wanted[: -len('_moe')]}."
        )
    with tempfile.TemporaryDirectory(prefix="hf_moe.") as folder:
        made = upcycle(source, Path(folder) / "moe", verify=False, **recipe)
        model = cls.from_pretrained(made.path, **loading)
    model.config._name_or_path = model.name_or_path = str(source)
    return model
