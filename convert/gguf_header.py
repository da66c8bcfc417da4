"""The header of a GGUF file, checked to the byte. Arrays (the vocabulary, say) are stepped over."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from hf_moe.errors import SourceError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GgufHeader:
    """`values`: numbers and strings by key; `tensors`: name -> number of elements."""

    values: dict[str, Any]
    tensors: dict[str, int]


def read_gguf_header(file: Path) -> GgufHeader:
    """The header of `file`, whose tensors all lie inside it.

    Raises:
        SourceError: where it is no GGUF file, or is cut short or damaged.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            if handle.read(4) != MAGIC:
                raise SourceError(f"{file}: is no GGUF file, though it is named like one.")
            header, end = _read(_Reader(handle, size))
    except OSError as error:
        raise SourceError(f"{file}: can't be read ({error.strerror}).") from error
    except (struct.error, ValueError) as error:
        raise SourceError(f"{file}: its GGUF header is cut short or damaged ({error}).") from error
    if end > size:
        raise SourceError(f"{file}: should hold {end} bytes, but holds {size}: it is cut short or damaged.")
    return header


class _Reader:
    """Little-endian values, one after another, none of them beyond the end of the file."""

    def __init__(self, handle: BinaryIO, size: int):
        self.handle, self.size = handle, size

    def room(self, count: int) -> int:
        """`count`, where so many bytes are left."""
        if count > self.size - self.handle.tell():
            raise ValueError("a value reaches beyond the end of the file")
        return count

    def scalars(self, form: str) -> tuple[Any, ...]:
        form = f"<{form}"
        return struct.unpack(form, self.handle.read(struct.calcsize(form)))

    def string(self) -> str:
        return self.handle.read(self.room(*self.scalars("Q"))).decode()

    def value(self, kind: int) -> Any:
        """A number, a string, or None for an array, whose elements are skipped."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.scalars(SCALARS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"a value of type {kind}")
        kind, count = self.scalars("IQ")
        if kind == STRING:
            for _ in range(count):
                self.handle.seek(self.room(*self.scalars("Q")), 1)
        elif kind in SCALARS:
            self.handle.seek(self.room(count * struct.calcsize(SCALARS[kind])), 1)
        else:
            raise ValueError(f"an array of type {kind}")
        return None


def _read(reader: _Reader) -> tuple[GgufHeader, int]:
    """The header, and where the last tensor ends."""
    from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

    version, tensor_count, value_count = reader.scalars("IQQ")
    if version not in VERSIONS:
        raise ValueError(f"version {version}, where {VERSIONS[0]} and {VERSIONS[1]} are read")
    values = {}
    for _ in range(value_count):
        name = reader.string()
        values[name] = reader.value(*reader.scalars("I"))
    tensors: dict[str, int] = {}
    ends = [0]
    for _ in range(tensor_count):
        name = reader.string()
        [dimensions] = reader.scalars("I")
        if name in tensors or dimensions > MAX_DIMENSIONS:
            raise ValueError(f"tensor {name!r} stands twice or has {dimensions} dimensions")
        tensors[name] = math.prod(reader.scalars(f"{dimensions}Q"))
        kind, offset = reader.scalars("IQ")
        elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        ends.append(offset + tensors[name] // elements * nbytes)
    alignment = values.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(f"an alignment of {alignment!r}")
    start = math.ceil(reader.handle.tell() / alignment) * alignment
    return GgufHeader(values, tensors), start + max(ends)
