"""Single experts as they lie on disk: `experts.safetensors`, and `experts_config.json` that says what they are of."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_moe.convert.checkpoint import Checkpoint, read_config, read_json
from hf_moe.convert.conversion import write_config
from hf_moe.convert.headers import TensorInfo, read_header
from hf_moe.convert.manifest import write_manifest
from hf_moe.convert.mixture import Mixture
from hf_moe.errors import SourceError, UsageError
from hf_moe.modeling import moe_artefact, moe_native_artefact
from hf_moe.modeling.configuration_moe import MoeConfigMixin
from hf_moe.modeling.moe_artefact import CONFIG_NAME, DECODERS, FORMAT, MARK, WEIGHTS_NAME

# What `from_pretrained` loads: of an artefact it would fill all but the experts at random.
LOADABLE = re.compile(
    r"(model|pytorch_model|adapter_model|tf_model|flax_model)([.-].*)?\.(safetensors|bin|h5|msgpack)(\.index\.json)?"
)
# Auto class -> the class that a native mixture has for it.
_AUTO = (
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
)
_BASE: dict[str, tuple[type, ...]] = {"repo": (str,), "commit": (str, type(None)), "files": (dict,)}
_ENTRY: dict[str, tuple[type, ...]] = {
    "shape": (list,),
    "dtype": (str,),
    "sha256": (str,),
    "layer": (int,),
    "expert": (int, str),
    "how": (str,),
    "into": (str,),
    "start": (int,),
    "error": (float, int),
}


@dataclass(frozen=True)
class Artefact:
    """Args:
    path: its folder.
    source: what the user calls it.
    held: `experts_config.json`, checked.
    infos: where each of its tensors lies.
    """

    path: Path
    source: str
    held: dict[str, Any]
    infos: dict[str, TensorInfo]

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        return self.held["tensors"]

    def read(self, name: str) -> torch.Tensor:
        """What is stored of a tensor; its digest is checked where it is decoded."""
        return Checkpoint(self.path, self.source, None, {}, self.infos).read(name)


def key_of(entry: dict[str, Any]) -> str:
    """LAYER.EXPERT of an entry."""
    return f"{entry['layer']}.{entry['expert']}"


def open_artefact(path: Path, source: str | None = None) -> Artefact:
    """An artefact's folder, checked.

    Raises:
        SourceError: where it is none, is damaged, or holds a file that would be loaded by accident.
    """
    source = source or str(path)
    if not path.is_dir():
        raise SourceError(f"{source}: no such folder.")
    check_names(path.iterdir(), source)
    read_config(path)
    held = check_described(read_json(path / CONFIG_NAME), source)
    if not (path / WEIGHTS_NAME).is_file():
        raise SourceError(f"{source}: has no {WEIGHTS_NAME}.")
    infos = dict(read_header(path / WEIGHTS_NAME, path))
    check_held(held, infos, source)
    return Artefact(path, source, held, infos)


def check_names(files: Iterable[Path], source: str) -> None:
    """Raises SourceError where a file has a name under which `from_pretrained` would load it."""
    for file in files:
        if LOADABLE.fullmatch(file.name):
            raise SourceError(
                f"{source}: holds {file.name}, which from_pretrained would load by accident, with everything but the "
                f"experts at random; experts belong in {WEIGHTS_NAME}."
            )


def check_held(held: dict[str, Any], names: Iterable[str], source: str) -> None:
    """Raises SourceError where weights and description do not name the same tensors."""
    apart = sorted(set(held["tensors"]) ^ set(names))
    if apart:
        raise SourceError(f"{source}: {WEIGHTS_NAME} and {CONFIG_NAME} do not agree on tensor {apart[0]!r}.")


def check_described(held: dict[str, Any], source: str) -> dict[str, Any]:
    """`experts_config.json`, once it is seen to say what it must. Raises SourceError."""
    where = f"{source}: {CONFIG_NAME}"
    if held.get("format") != FORMAT:
        raise SourceError(f"{where} is of format {held.get('format')!r}; this version reads format {FORMAT}.")
    base: Any = held.get("base")
    tensors = held.get("tensors")
    if not (_fits(base, _BASE) and base["files"] and all(isinstance(one, str) for one in base["files"].values())):
        raise SourceError(f"{where} does not name its base.")
    if not isinstance(tensors, dict) or not tensors:
        raise SourceError(f"{where} names no tensors.")
    for name, entry in tensors.items():
        if not (
            _fits(entry, _ENTRY) and entry["how"] in DECODERS and all(type(side) is int for side in entry["shape"])
        ):
            raise SourceError(f"{where} does not say what tensor {name!r} is.")
    return held


def _fits(held: Any, kinds: dict[str, tuple[type, ...]]) -> bool:
    return isinstance(held, dict) and all(type(held.get(key)) in kind for key, kind in kinds.items())


def base_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What names the base without doubt."""
    return {"repo": checkpoint.source, "commit": checkpoint.revision, "files": dict(checkpoint.sha256)}


def check_base(artefact: Artefact, base: Mixture) -> None:
    """Raises UsageError where the artefact was made for another base, saying what of both."""
    kind, wanted = base.config.model_type, artefact.held.get("model_type")
    path, of = base.checkpoint.path, artefact.held["base"]
    if kind != wanted:
        raise UsageError(f"{artefact.source}: holds experts of a {wanted}, but {path} is a {kind}.")
    for what, held in (("num_experts", base.num_experts), ("width", base.width)):
        if artefact.held.get(what) != held:
            raise UsageError(f"{artefact.source}: is of {what} {artefact.held.get(what)}, but {path} of {held}.")
    found = base.checkpoint.sha256
    for name in sorted(of["files"].keys() | found.keys()):
        if of["files"].get(name) != found.get(name):
            raise UsageError(
                f"{artefact.source}: was made for another base ({of['repo']}, commit {of['commit']}): the sha256 of "
                f"{name} was {of['files'].get(name, 'none')}, and in {path} it is {found.get(name, 'none')}."
            )


def write_beside(
    folder: Path,
    described: dict[str, Any],
    config: transformers.PretrainedConfig,
    side: Checkpoint,
    sources: list[dict[str, Any]],
) -> None:
    """All but the weights: description, configuration and the code that opens it, tokenizer, manifest."""
    versions = {name: metadata.version(name) for name in ("hf_moe", "torch", "transformers")}
    described = {"format": FORMAT, **described, "versions": versions}
    (folder / CONFIG_NAME).write_text(json.dumps(described, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    write_config(config, side, config.model_type, folder)
    values = {**read_json(folder / "config.json"), MARK: True}
    if not isinstance(config, MoeConfigMixin):
        values["auto_map"] = _native_auto_map(config)
        for module in (moe_artefact, moe_native_artefact):
            file = Path(str(module.__file__))
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "config.json").write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_manifest(folder, sources, {})


def _native_auto_map(config: transformers.PretrainedConfig) -> dict[str, str]:
    module = moe_native_artefact.__name__.rpartition(".")[2]
    classes = {auto: getattr(transformers, auto)._model_mapping.get(type(config), None) for auto in _AUTO}
    return {auto: f"{module}.{found.__name__}" for auto, found in classes.items() if found is not None}
