"""A safetensors file written tensor by tensor, whose sizes are known only once they are made."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path

import torch

from hf_moe.convert.headers import SAFETENSORS_NAMES

ENTRY_BYTES = 200  # of a header, beside the name: dtype, shape and offsets


def write_tensors(file: Path, tensors: Iterable[tuple[str, torch.Tensor]], names: Iterable[str]) -> int:
    """Writes `tensors`, wide dtypes first, one of them in memory at a time: after room for a header that fits `names`.

    Returns the file's size.
    """
    room = 64 + sum(len(json.dumps(name)) + ENTRY_BYTES for name in names)
    room += -room % 8
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    with open(file, "wb") as handle:
        handle.seek(8 + room)
        for name, values in tensors:
            data = values.contiguous().view(-1).view(torch.uint8).numpy().data
            handle.write(data)
            header[name] = {
                "dtype": SAFETENSORS_NAMES[values.dtype],
                "shape": list(values.shape),
                "data_offsets": [position, position + len(data)],
            }
            position += len(data)
        raw = json.dumps(header, separators=(",", ":")).encode()
        handle.seek(0)
        handle.write(struct.pack("<Q", room) + raw.ljust(room))
    return 8 + room + position
