"""Headers of safetensors files, checked to the byte."""

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_moe.errors import SourceError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as a safetensors header describes it; `start` is its first byte in `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def read_header(file: Path, folder: Path) -> Iterator[tuple[str, TensorInfo]]:
    """Tensors of one safetensors file, after checking that header and file agree to the byte."""
    check_inside(file, folder)
    size = file.stat().st_size
    with open(file, "rb") as handle:
        prefix = handle.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
            raise SourceError(f"{file}: is cut short or no safetensors file (header of {header_bytes} bytes).")
        raw = handle.read(header_bytes)
    position = 0
    for info in parse_header(raw, file):
        position = info.start + info.nbytes - 8 - header_bytes
        yield info.name, info
    if 8 + header_bytes + position != size:
        held = size - 8 - header_bytes
        raise SourceError(
            f"{file}: should hold {position} bytes of tensors, but holds {held}: it is cut short or damaged."
        )


def parse_header(raw: bytes, file: Path) -> Iterator[TensorInfo]:
    """The tensors that a header, without its length, describes; they follow each other from its end on.

    Raises:
        SourceError: where it does not.
    """
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
        metadata = header.pop("__metadata__", {})
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("__metadata__ holds more than strings")
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        position = 0
        for name, entry in entries:
            start, end = entry["data_offsets"]
            if any(type(number) is not int for number in (start, end, *entry["shape"])):
                raise ValueError(f"{name!r} is described by more than whole numbers")
            if entry["dtype"] not in DTYPES:
                raise SourceError(f"{file}: tensor {name!r} has dtype {entry['dtype']}, which is not read here.")
            info = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), file, 8 + len(raw) + start)
            if start != position or end - start != info.nbytes or any(side < 0 for side in info.shape):
                raise SourceError(f"{file}: the header's offsets of tensor {name!r} do not fit its shape.")
            position = end
            yield info
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SourceError(f"{file}: its safetensors header can't be read ({error}).") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name stands twice")
    return made


def check_inside(file: Path, folder: Path) -> None:
    """A link may lead to the Hub cache's own blobs, and nowhere else out of the folder."""
    folder = folder.resolve()
    allowed = [folder] + ([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])
    if not any(file.resolve().is_relative_to(root) for root in allowed):
        raise SourceError(f"{file}: is a link that leads out of its folder, to {file.resolve()}.")
