"""Opens a checkpoint that holds single experts only: its base is fetched, and the experts are put into its tensors.

Beside `config.json` stand `experts.safetensors` and `experts_config.json`, which names the base by the digests of its
files and says of each tensor: `into` which of the base's it goes, at which of its values, counted in order, it has its
`start`, and `how` it is written down (`DECODERS`).
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import GenerationConfig, PretrainedConfig
from transformers.utils import cached_file

FORMAT = 1
CONFIG_NAME = "experts_config.json"
WEIGHTS_NAME = "experts.safetensors"  # no name that `from_pretrained` would load, the rest at random
MARK = "experts_only"  # in config.json

# Arguments of `from_pretrained` that say how files are got.
_GETTING = ("cache_dir", "force_download", "local_files_only", "token")


def _full(stored: torch.Tensor, old: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    return stored


def _xor(stored: torch.Tensor, old: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """The bits that differ: all first bytes, all second ones, …, deflated."""
    unpack = zlib.decompressobj()
    raw = unpack.decompress(stored.numpy().tobytes(), old.nbytes)
    if len(raw) != old.nbytes:
        raise ValueError("its difference is of another size")
    planes = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(old.element_size(), -1)
    return (planes.T.reshape(-1) ^ old.reshape(-1).view(torch.uint8)).view(old.dtype)


def _delta(stored: torch.Tensor, old: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """A difference in bfloat16, added and rounded once."""
    wide = torch.promote_types(old.dtype, torch.float32)
    return (old.to(wide) + stored.view(old.shape).to(wide)).to(old.dtype)


def _low_rank(stored: torch.Tensor, old: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """(out + in, rank): B above A transposed; B A is added, and rounded once."""
    wide = torch.promote_types(old.dtype, torch.float32)
    b, a = stored.to(wide).split([old.shape[0], old.shape[1]])
    return (old.to(wide) + b @ a.T).to(old.dtype)


def _sparse(stored: torch.Tensor, old: torch.Tensor, entry: dict[str, Any]) -> torch.Tensor:
    """`count` indices, int32, and the new values there."""
    count = entry["count"]
    index = stored[: 4 * count].clone().view(torch.int32).long()
    values = stored[4 * count :][: old.element_size() * count].clone().view(old.dtype)
    return old.reshape(-1).clone().index_copy_(0, index, values)


# How a tensor is written down -> what is stored, the base's values, its entry -> the new values.
DECODERS: dict[str, Callable[[torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]] = {
    "full": _full,
    "xor": _xor,
    "delta": _delta,
    "low_rank": _low_rank,
    "sparse": _sparse,
}


def decode(name: str, entry: dict[str, Any], stored: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The values that `stored` stands for, of the shape of `old`, the base's.

    Raises:
        ValueError: where it is damaged, or made for another tensor.
    """
    digest = hashlib.sha256(stored.reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    if digest != entry["sha256"]:
        raise ValueError(f"{name} is damaged: its sha256 is {digest}, and should be {entry['sha256']}.")
    try:
        made = DECODERS[entry["how"]](stored, old, entry)
        if made.dtype != old.dtype:
            raise ValueError(f"it is of {made.dtype}")
        return made.reshape(old.shape)
    except (zlib.error, KeyError, TypeError, RuntimeError, IndexError, ValueError) as error:
        raise ValueError(f"{name} does not fit the base's {old.dtype} of {list(old.shape)} ({error}).") from error


def opening_artefacts(load: Callable, cls: Any, path: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """`from_pretrained` of a class: what is given with its experts only is opened, all else goes to `load`."""
    config = kwargs.get("config")
    if isinstance(config, PretrainedConfig):
        return from_artefact(load, path, args, kwargs) if getattr(config, MARK, False) else load(path, *args, **kwargs)
    getting = {name: kwargs[name] for name in (*_GETTING, "revision", "subfolder") if name in kwargs}
    if config is not None or path is None or not _is_marked(cls.config_class, path, getting):
        return load(path, *args, **kwargs)
    config, left = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
    return from_artefact(load, path, args, {**left, **getting, "config": config})


def _is_marked(config_class: Any, path: Any, getting: dict[str, Any]) -> bool:
    try:
        return bool(config_class.get_config_dict(path, **getting)[0].get(MARK))
    except OSError:  # of which `load` will tell
        return False


def from_artefact(load: Callable, path: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The base with the experts of `path` in it, by `load`, a dense `from_pretrained`.

    Args:
        kwargs: of `from_pretrained`, `config` among them; `experts_base` is a folder with the base, for one that is
            on no Hub. (Without it, it is looked for beside `path`.)

    Raises:
        OSError: where the base is not to be had.
        ValueError: where it is another than the experts were made for, or something is damaged.
    """
    config, given = kwargs.pop("config"), kwargs.pop("experts_base", None)
    getting = {name: kwargs.pop(name) for name in _GETTING if name in kwargs}
    of_path = {**getting, "revision": kwargs.pop("revision", None) or "main", "subfolder": kwargs.pop("subfolder", "")}
    described, weights = (cached_file(path, name, **of_path) for name in (CONFIG_NAME, WEIGHTS_NAME))
    held = json.loads(Path(str(described)).read_text(encoding="utf-8"))
    if held.get("format") != FORMAT:
        raise ValueError(f"{path}: {CONFIG_NAME} is of format {held.get('format')}, and this code reads {FORMAT}.")
    tensors = _base_tensors(held["base"], given, path, getting)
    try:
        put_in(tensors, held["tensors"], _load(weights))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{path}: {error}") from error
    delattr(config, MARK)  # what is saved from here on is whole
    model = load(None, *args, config=config, state_dict=tensors, **kwargs)
    model.config._name_or_path = model.name_or_path = str(path)
    generation = cached_file(path, "generation_config.json", _raise_exceptions_for_missing_entries=False, **of_path)
    if generation is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(Path(generation).parent)
    return model


def put_in(
    tensors: dict[str, torch.Tensor], entries: dict[str, dict[str, Any]], stored: dict[str, torch.Tensor]
) -> None:
    """Replaces in `tensors`, the base's, those that `entries` go into. Errors as in `decode`."""
    copied: set[str] = set()
    for name, entry in entries.items():
        into, start, shape = entry["into"], entry["start"], torch.Size(entry["shape"])
        if not 0 <= start <= start + shape.numel() <= tensors[into].numel():
            raise ValueError(f"{name} goes beyond the base's {into}.")
        if into not in copied:
            tensors[into] = tensors[into].clone(memory_format=torch.contiguous_format)
            copied.add(into)
        place = tensors[into].view(-1)[start : start + shape.numel()]
        place.copy_(decode(name, entry, stored[name], place.view(shape)).reshape(-1))


def _base_tensors(base: dict[str, Any], given: Any, path: Any, getting: dict[str, Any]) -> dict[str, torch.Tensor]:
    folder = _find_base(base, given, path, getting)
    tensors: dict[str, torch.Tensor] = {}
    for name, wanted in base["files"].items():
        file = folder / Path(name).name
        if not file.is_file():
            raise OSError(f"{path}: its base {base['repo']} has no {name} in {folder}.")
        found = sha256_of(file)
        if found != wanted:
            raise ValueError(
                f"{path}: the base changed since: the sha256 of {name} of {base['repo']} is {found}, and the experts "
                f"were made for {wanted}."
            )
        tensors |= _load(file)
    return tensors


def _load(file: Any) -> dict[str, torch.Tensor]:
    # here, so that a whole checkpoint does not depend on where Transformers keeps it
    from transformers.modeling_utils import load_state_dict

    return load_state_dict(str(file))


def _find_base(base: dict[str, Any], given: Any, path: Any, getting: dict[str, Any]) -> Path:
    if given is not None:
        return Path(given)
    if base["commit"]:
        return Path(
            snapshot_download(base["repo"], revision=base["commit"], allow_patterns=list(base["files"]), **getting)
        )
    beside = Path(path).absolute().parent / Path(base["repo"]).name
    if not beside.is_dir():
        raise OSError(
            f"{path}: its base {base['repo']!r} is on no Hub, and no folder beside it: name it by "
            "from_pretrained(…, experts_base=FOLDER)."
        )
    return beside


def sha256_of(file: Path) -> str:
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
