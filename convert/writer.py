"""Writing safetensors files at disk speed: one thread makes the bytes, one writes them, one digests them.

Files are written past the page cache where the file system allows it (O_DIRECT), in aligned blocks: the copy into the
cache would cost more than everything else together. Memory is bounded by `BLOCKS` blocks.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory

from .checkpoint import INDEX_NAME
from .headers import DTYPES
from .plan import TensorPlan

BLOCK = 8 * 2**20
ALIGNMENT = 4096
BLOCKS = 5
MARK_BYTES = 128 * BLOCK  # how often a file's progress is made durable

Pieces = Callable[[TensorPlan], Iterator[torch.Tensor]]


@dataclass(frozen=True)
class Mark:
    """That the first `position` bytes of `file` are on disk, and have this digest."""

    file: str
    position: int
    sha256: str


def split(tensors: Iterable[TensorPlan], max_shard_size: str) -> dict[str, list[TensorPlan]]:
    """File name -> the tensors in it: wide dtypes first, so that each starts at a multiple of its item size, as
    safetensors wants it."""
    by_name = {tensor.name: tensor for tensor in tensors}
    found = split_state_dict_into_shards_factory(
        by_name,
        get_storage_size=lambda tensor: tensor.nbytes,
        get_storage_id=lambda tensor: None,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    return {
        file: sorted((by_name[name] for name in names), key=lambda tensor: -DTYPES[tensor.dtype].itemsize)
        for file, names in found.filename_to_tensors.items()
    }


def file_bytes(tensors: list[TensorPlan]) -> int:
    """Size of a file that holds `tensors`."""
    return len(_header(tensors)) + sum(tensor.nbytes for tensor in tensors)


def index_of(shards: dict[str, list[TensorPlan]]) -> dict[str, Any]:
    """What stands in `INDEX_NAME`."""
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)},
        "weight_map": {tensor.name: file for file, tensors in shards.items() for tensor in tensors},
    }


def write_weights(
    shards: dict[str, list[TensorPlan]],
    pieces: Pieces,
    folder: Path,
    *,
    marks: dict[str, Mark],
    mark: Callable[[Mark], None] | None,
    progress: Callable[[int], None],
) -> dict[str, str]:
    """Writes `shards` into `folder`, each durable before the next begins, and their index where there are several.

    Args:
        pieces: makes a tensor's values, in order.
        marks: file -> what an earlier run made durable of it; what does not have its digest is written anew.
        mark: is called with every new mark; None: nothing is digested, and nothing can be resumed.
        progress: is called with the number of bytes written since its last call.

    Returns:
        file -> sha256 (empty without `mark`). Errors are those of `pieces`, and OSError.
    """
    digests: dict[str, str] = {}
    for file, tensors in shards.items():
        with _Shard(folder / file, mark, progress) as shard:
            if file in marks:
                shard.resume(marks[file])
            shard.add(memoryview(_header(tensors)))
            for tensor in tensors:
                if shard.position + tensor.nbytes <= shard.done:
                    shard.position += tensor.nbytes
                    continue
                for values in pieces(tensor):
                    shard.add(values.contiguous().view(-1).view(torch.uint8).numpy().data)
            shard.finish()
            digests[file] = shard.sha256.hexdigest()
    if len(shards) > 1:
        (folder / INDEX_NAME).write_text(
            json.dumps(index_of(shards), indent=2, sort_keys=True) + "\n", encoding="utf-8"
        )
    return digests if mark is not None else {}


def _header(tensors: list[TensorPlan]) -> bytes:
    """Of a file with `tensors` in this order."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


class _Shard:
    """One file while it is written: blocks are filled here, and written and digested by a thread each.

    Args:
        mark: is told what has become durable; None: nothing is digested.
        progress: is told how many more bytes are written.
    """

    def __init__(self, path: Path, mark: Callable[[Mark], None] | None, progress: Callable[[int], None]):
        self.path, self.mark, self.progress = path, mark, progress
        self.sha256 = hashlib.sha256()
        self.done = 0  # bytes that an earlier run made durable
        self.position = 0  # of the bytes made so far
        self.block, self.filled = mmap.mmap(-1, BLOCK), 0  # anonymous maps are aligned to pages
        self.busy: deque[tuple[mmap.mmap, list[Future]]] = deque()

    def __enter__(self) -> "_Shard":
        self.handle = _open_direct(self.path)
        self.writer, self.digester = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.shutdown(cancel_futures=True)
        self.digester.shutdown(cancel_futures=True)
        os.close(self.handle)

    def resume(self, mark: Mark) -> None:
        """Takes over what is there, if it is what the mark says it is."""
        found, left = hashlib.sha256(), mark.position
        with open(self.path, "rb", buffering=0) as file:
            while left and (data := file.read(min(left, BLOCK))):
                found.update(data)
                left -= len(data)
        if found.hexdigest() == mark.sha256:
            self.sha256, self.done = found, mark.position
            self.progress(self.done)

    def add(self, data: memoryview) -> None:
        """Appends `data`, but for what is on disk already."""
        skipped = min(len(data), max(0, self.done - self.position))
        self.position += len(data)
        data = data[skipped:]
        while data:
            count = min(len(data), BLOCK - self.filled)
            self.block[self.filled : self.filled + count] = data[:count]
            self.filled += count
            data = data[count:]
            if self.filled == BLOCK:
                self._send(self.position - len(data))
                if (self.position - len(data)) % MARK_BYTES == 0:
                    self._settle(self.position - len(data))

    def finish(self) -> None:
        """Makes the file whole and durable."""
        if self.done < self.position:
            if self.filled:
                self._send(self.position)
            self._wait(0)
            os.ftruncate(self.handle, self.position)
            self._settle(self.position)

    def _send(self, end: int) -> None:
        """Hands over the block whose last byte is the file's `end`-th, and takes another."""
        futures = [self.writer.submit(self._write, self.block, self.filled, end - self.filled)]
        if self.mark is not None:
            futures.append(self.digester.submit(self.sha256.update, memoryview(self.block)[: self.filled]))
        self.busy.append((self.block, futures))
        self.block, self.filled = self._wait(BLOCKS - 1) or mmap.mmap(-1, BLOCK), 0

    def _wait(self, left: int) -> mmap.mmap | None:
        """Until at most `left` blocks are busy; returns one that is free again. Raises what their threads raised."""
        block = None
        while len(self.busy) > left:
            block, futures = self.busy.popleft()
            for future in futures:
                future.result()
        return block

    def _write(self, block: mmap.mmap, filled: int, start: int) -> None:
        """Direct writing wants whole aligned units; what goes past the end is cut off when the file is finished."""
        view = memoryview(block)[: -(-filled // ALIGNMENT) * ALIGNMENT]
        while view:
            try:
                count = os.pwrite(self.handle, view, start)
            except OSError as error:
                if error.errno != errno.EINVAL or not _stop_direct(self.handle):
                    raise
                continue
            view, start = view[count:], start + count
        self.progress(filled)

    def _settle(self, position: int) -> None:
        self._wait(0)
        os.fsync(self.handle)
        if self.mark is not None:
            self.mark(Mark(self.path.name, position, self.sha256.copy().hexdigest()))


def _open_direct(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


def _stop_direct(handle: int) -> bool:
    """Whether the handle wrote directly until now, which some file systems allow only to refuse it later."""
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    fcntl.fcntl(handle, fcntl.F_SETFL, flags & ~direct)
    return bool(flags & direct)
