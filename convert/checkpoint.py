"""Reading a checkpoint folder without building its model: config.json and safetensors headers, checked strictly."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from hf_moe.errors import SourceError

from .headers import DTYPES, TensorInfo, check_inside, read_header

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
GGUF_SUFFIX = ".gguf"
PIECE_BYTES = 32 * 2**20  # read at a time

# A tokenizer is there if one of these is.
VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# What a conversion takes along besides the weights; nothing else of a source is copied, or downloaded.
SIDE_FILES = (
    *VOCABULARIES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "normalizer.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "COPYING*",
    "NOTICE*",
    "USE_POLICY*",
)


# What our own code reads of a config.json; the rest is Transformers' to check.
CONFIG_TYPES = {
    "model_type": str,
    "architectures": list,
    "num_experts": int,
    "num_experts_per_tok": int,
    "moe_layers": list,
}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder: its configuration and where each tensor lies. Nothing is loaded.

    Args:
        path: the folder.
        source: the Hub id or folder name it goes by.
        revision: the commit, for a checkpoint from the Hub.
        config: `config.json` as it stands.
        tensors: name -> where it lies, in the order of the files.
        digests: weights file -> sha256, where it is known already.
        gguf, gguf_sha256: the GGUF file that the folder was made from, and its digest.
    """

    path: Path
    source: str
    revision: str | None
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    digests: dict[str, str] = field(default_factory=dict)
    gguf: Path | None = None
    gguf_sha256: str | None = None

    @property
    def origin(self) -> Path:
        """What the user has named: the folder, or the GGUF file."""
        return self.gguf or self.path

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def side_files(self) -> list[Path]:
        found = sorted({file for pattern in SIDE_FILES for file in self.path.glob(pattern) if file.is_file()})
        for file in found:
            check_inside(file, self.path)
        return found

    @property
    def has_tokenizer(self) -> bool:
        return any((self.path / name).is_file() for name in VOCABULARIES)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Digest of each weights file, as `sha256sum` prints it; of the GGUF file, where the weights come from one."""
        if self.gguf is not None and self.gguf_sha256 is not None:
            return {self.gguf.name: self.gguf_sha256}
        return {file.name: self.digests.get(file.name) or file_sha256(file) for file in self.files}

    @property
    def identity(self) -> dict[str, Any]:
        """What names this checkpoint without doubt."""
        return {"source": self.source, "revision": self.revision, "sha256": self.sha256}

    @cached_property
    def stamps(self) -> dict[str, tuple[int, int]]:
        """Weights file -> size and time of change, when first asked."""
        return self._stamps()

    def _stamps(self) -> dict[str, tuple[int, int]]:
        return {file.name: (file.stat().st_size, file.stat().st_mtime_ns) for file in self.files}

    def check_unchanged(self) -> None:
        """Raises SourceError where a weights file is not what it was when `stamps` were first asked for."""
        if self._stamps() != self.stamps:
            raise SourceError(f"{self.path}: the weights changed while they were read.")

    def read(self, name: str) -> torch.Tensor:
        """The tensor `name`, read from its file (not memory-mapped: a file cut short meanwhile must not kill us).

        Raises:
            SourceError: where the file ends before the tensor does.
        """
        info = self.tensors[name]
        [values] = self.read_pieces(name, max(info.nbytes, 1))
        return values.view(info.shape)

    def read_pieces(self, name: str, piece_bytes: int = PIECE_BYTES) -> Iterator[torch.Tensor]:
        """The tensor's values in order, flat, at most `piece_bytes` (but one value) at a time; errors as in `read`."""
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        step = max(1, piece_bytes // dtype.itemsize) * dtype.itemsize
        with open(info.file, "rb", buffering=0) as file:
            file.seek(info.start)
            for start in range(0, max(info.nbytes, 1), step):
                values = torch.empty(min(step, info.nbytes - start) // dtype.itemsize, dtype=dtype)
                view, filled = values.view(torch.uint8).numpy().data, 0
                while filled < len(view):
                    count = file.readinto(view[filled:])
                    if not count:
                        raise SourceError(
                            f"{info.file}: ends inside tensor {name!r}; the file changed while it was read."
                        )
                    filled += count
                yield values


def file_sha256(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def open_checkpoint(source: str | os.PathLike[str], revision: str | None = None) -> Checkpoint:
    """Opens a local folder or GGUF file, or downloads the weights, configuration, tokenizer and processors of a Hub
    repository.

    Raises:
        SourceError: where there is no such checkpoint, or it is damaged or unsafe; in one line.
        UsageError, OutputError: where a GGUF file can't be unpacked here.
    """
    path, commit = _find(source, revision)
    if path.is_file():
        from .gguf import open_gguf  # here, because it opens the folder that it makes

        return open_gguf(path)
    name = str(source) if commit else path.resolve().name
    return Checkpoint(path=path, source=name, revision=commit, config=read_config(path), tensors=_read_tensors(path))


def _find(source: str | os.PathLike[str], revision: str | None) -> tuple[Path, str | None]:
    try:
        path = Path(source).expanduser()
        if path.is_dir() or (path.is_file() and path.suffix.lower() == GGUF_SUFFIX):
            return path, None
        if path.exists():
            raise SourceError(f"{path}: is a file; name a folder with config.json and weights, or a .gguf file.")
    except (OSError, RuntimeError) as error:  # a name too long, a home that is nobody's
        raise SourceError(f"{source}: no such folder ({error}).") from error
    text = str(source)
    if path.suffix.lower() == GGUF_SUFFIX:
        raise SourceError(f"{text}: no such file.")
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise SourceError(f"{text}: no such folder.")
    try:
        patterns = ["config.json", "*.safetensors", INDEX_NAME, *SIDE_FILES]
        folder = Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SourceError(f"{text}: no such folder, and the Hub did not give it either ({reason})") from error
    return folder, folder.name


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; duplicate keys are refused.

    Raises:
        SourceError: where the file is missing, no JSON, or no object.
    """

    def unique(pairs):
        keys = [key for key, _ in pairs]
        twice = {key for key in keys if keys.count(key) > 1} if len(set(keys)) < len(keys) else None
        if twice:
            raise SourceError(f"{file}: key {sorted(twice)[0]!r} stands twice.")
        return dict(pairs)

    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=unique)
    except FileNotFoundError as error:
        raise SourceError(f"{file.parent}: has no {file.name}.") from error
    except OSError as error:
        raise SourceError(f"{file}: can't be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{file}: is no JSON ({error}).") from error
    if not isinstance(value, dict):
        raise SourceError(f"{file}: should hold a JSON object, but holds a {type(value).__name__}.")
    return value


def read_config(path: Path) -> dict[str, Any]:
    """`config.json` of a folder; errors as in `read_json`."""
    if not any(path.iterdir()):
        raise SourceError(f"{path}: the folder is empty.")
    check_inside(path / "config.json", path)
    config = read_json(path / "config.json")
    for name, kind in CONFIG_TYPES.items():
        if not isinstance(config.get(name), kind | None):
            raise SourceError(f"{path}: config.json holds a {type(config[name]).__name__} as {name}.")
    if any(not isinstance(name, str) for name in config.get("architectures") or []):
        raise SourceError(f"{path}: config.json names no class in architectures.")
    if config.get("transformers_weights"):
        raise SourceError(f"{path}: config.json points to weights of another name (transformers_weights).")
    if (path / "adapter_config.json").exists():
        raise SourceError(f"{path}: holds a PEFT adapter; merge it into its base model first (merge_and_unload).")
    return config


def _read_tensors(path: Path) -> dict[str, TensorInfo]:
    index_file = path / INDEX_NAME
    if (path / WEIGHTS_NAME).is_file():  # as Transformers does, a single file wins over an index
        return dict(read_header(path / WEIGHTS_NAME, path))
    if index_file.is_file():
        return _read_shards(path, index_file)
    if (path / "experts.safetensors").is_file():
        raise SourceError(f"{path}: holds single experts only; hf-moe experts apply puts them into their base.")
    pickles = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        raise SourceError(
            f"{path}: holds only pickled weights ({pickles[0]}), which can run code when opened; save it as "
            "safetensors first (from_pretrained, then save_pretrained)."
        )
    raise SourceError(f"{path}: has a config.json but no weights ({WEIGHTS_NAME} or {INDEX_NAME}).")


def _read_shards(path: Path, index_file: Path) -> dict[str, TensorInfo]:
    check_inside(index_file, path)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"{index_file}: has no weight_map.")
    tensors: dict[str, TensorInfo] = {}
    for shard in sorted({str(file) for file in weight_map.values()}):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise SourceError(f"{index_file}: names {shard!r}, which is no safetensors file of this folder.")
        if not (path / shard).is_file():
            raise SourceError(f"{path}: shard {shard} is missing, though the index names it.")
        for name, info in read_header(path / shard, path):
            if name in tensors:
                raise SourceError(f"{path}: tensor {name!r} stands in two shards, {info.file.name} and another.")
            tensors[name] = info
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise SourceError(f"{index_file}: tensor {name!r} should be in {shard}, but is not.")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
        raise SourceError(
            f"{index_file}: does not list tensor {unlisted[0]!r}, which {tensors[unlisted[0]].file.name} holds."
        )
    return tensors
