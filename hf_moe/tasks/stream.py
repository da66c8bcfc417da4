"""Rows that are read while they are asked for."""

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info

from hf_moe.errors import HfMoeError, SourceError

READ = 100  # rows at a time


class Stream(IterableDataset):
    """A streamed dataset's rows, the same for any number of a loader's workers: the first of them reads.

    Args:
        rows: the library's IterableDataset.
        place: what a user calls it.
    """

    def __init__(self, rows: Any, place: str):
        self.rows, self.place = rows, place

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Raises SourceError where they can't be read."""
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return
        try:
            for batch in self.rows.iter(READ):
                yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))
        except HfMoeError:
            raise
        except Exception as error:  # the library raises anything
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise SourceError(f"{self.place}: can't be read to its end ({reason}).") from error
