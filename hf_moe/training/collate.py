"""What a collator draws at random, the same whenever a batch comes again."""

import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


class SeededCollator:
    """Calls `collator` with random numbers that follow from the rows, the epoch and a seed, and from nothing else.

    So a resumed run, one with more workers, and one with another model hide the same tokens, and dropout does not
    depend on how far ahead batches are fetched. Evaluation keeps epoch 0: its masks are always the same.

    Args:
        collator: rows -> batch.
        seed: of everything drawn.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], seed: int):
        self.collator, self.seed = collator, seed
        self.epoch = torch.zeros((), dtype=torch.long).share_memory_()  # workers that live on see it too

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        with drawing_from(self._seed_of(rows)):
            return self.collator(rows)

    def _seed_of(self, rows: list[Any]) -> int:
        digest = hashlib.sha256(f"{self.seed} {int(self.epoch)}".encode())
        for row in rows:
            for name in sorted(row):
                digest.update(_bytes_of(row[name]))
        return int.from_bytes(digest.digest()[:4], "big")


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    return repr(value).encode()


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Within it everything on the CPU draws from `seed`; afterwards from where it was."""
    held = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(held[0])
        np.random.set_state(held[1])
        random.setstate(held[2])
