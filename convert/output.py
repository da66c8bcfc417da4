"""The output folder: checked before anything is written, filled under another name, renamed when it is whole.

Beside `NAME` stands `NAME.partial` while it is made: a lock, the journal, and in `files` what becomes `NAME`. Whatever
kills the process, `NAME` is what it was, or the new one whole; the next run goes on from the journal.
"""

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hf_moe.errors import OutputError, UsageError

from .journal import JOURNAL_NAME, Journal

SLACK = 16 * 2**20  # for configuration, code, tokenizer
CHECKPOINT = "config.json"
RENAME_EXCHANGE = 2
AT_FDCWD = -100


def check_output(output: Path, sources: list[Path], nbytes: int, overwrite: bool, mark: str = CHECKPOINT) -> None:
    """Refuses an output that exists, overlaps a source, or can't hold `nbytes`; only what holds `mark` is overwritten.

    Raises:
        UsageError, OutputError: in one line.
    """
    try:
        resolved = output.resolve()
        for source in sources:
            dense = source.resolve()
            if resolved == dense or resolved.is_relative_to(dense) or dense.is_relative_to(resolved):
                raise UsageError(f"{output}: overlaps the source {source}; choose a folder outside it.")
        _check_taken(output, overwrite, mark)
    except OSError as error:
        raise UsageError(f"{output}: can't be a folder ({error.strerror}).") from error
    parent = next(parent for parent in resolved.parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: can't be written, {parent} is read-only.")
    free = shutil.disk_usage(parent).free + _held(partial_of(resolved))
    if free < nbytes + SLACK:
        raise OutputError(f"{output}: needs {nbytes + SLACK:,} bytes, but {parent} has {free:,} free.")


def _check_taken(output: Path, overwrite: bool, mark: str) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise UsageError(f"{output}: exists already; --overwrite replaces it.")
    if output.is_symlink() or not output.is_dir():
        raise UsageError(f"{output}: is no folder, so it is not overwritten.")
    if any(output.iterdir()) and not (output / mark).is_file():
        kind = "a checkpoint" if mark == CHECKPOINT else f"a folder with {mark}"
        raise UsageError(f"{output}: is neither empty nor {kind}, so it is not overwritten.")


def _held(partial: Path) -> int:
    """Bytes that an interrupted run has written already."""
    try:
        return sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    except OSError:
        return 0


def partial_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.partial")


@contextmanager
def whole_folder(
    output: Path, fingerprint: str, overwrite: bool, mark: str = CHECKPOINT
) -> Iterator[tuple[Path, Journal]]:
    """A folder to fill, and the journal of what it holds. It becomes `output` in one rename when the block ends well.

    When it ends in an error, everything is taken away. When it is interrupted (a signal, a kill), what the journal
    knows of is left for the next run with the same `fingerprint`.

    Raises:
        OutputError: where the file system refuses (read-only, no space left), or another run writes `output`.
    """
    output = output.resolve()
    partial = partial_of(output)
    try:
        with ExitStack() as undo:
            for folder in [parent for parent in reversed(output.parents) if not parent.exists()]:
                folder.mkdir()
                undo.callback(folder.rmdir)
            with locked(partial, output):
                _check_ours(partial)
                _restore(partial, output)
                _check_taken(output, overwrite, mark)
                journal = Journal(partial / JOURNAL_NAME, fingerprint)
                files = partial / "files"
                try:
                    _clear(files, set(journal.marks))
                    yield files, journal
                    sync(files)
                    replace(files, output, partial)
                except BaseException as error:
                    if isinstance(error, Exception) or not journal.marks:
                        with suppress(OSError):
                            _discard(partial)
                    else:
                        undo.pop_all()
                    raise
                undo.pop_all()
                _discard(partial)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise OutputError(f"{output}: can't be written ({error.strerror or error}{where}).") from error


@contextmanager
def locked(partial: Path, output: Path) -> Iterator[None]:
    """Makes `partial` and holds its lock, which a killed process lets go by itself."""
    while True:
        partial.mkdir(exist_ok=True)
        try:
            handle = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its owner has just finished
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if partial.exists() and os.path.samestat(os.fstat(handle), partial.stat()):
                yield
                return
        except BlockingIOError as error:
            raise OutputError(f"{output}: is being written by another run.") from error
        finally:
            os.close(handle)


def _check_ours(partial: Path) -> None:
    if any(partial.iterdir()) and not (partial / JOURNAL_NAME).is_file():
        raise UsageError(f"{partial}: is in the way, and was not left by an interrupted run; move it.")


def _discard(partial: Path) -> None:
    """The journal last: it is by the journal that the next run would know the rest as ours."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    (partial / JOURNAL_NAME).unlink(missing_ok=True)
    partial.rmdir()


def _restore(partial: Path, output: Path) -> None:
    """Brings back the old `output` that a kill between two renames left aside."""
    old = partial / "old"
    if old.exists() and not output.exists():
        old.rename(output)
    elif old.exists():
        shutil.rmtree(old)


def _clear(files: Path, known: set[str]) -> None:
    """Leaves of an earlier run only what the journal knows."""
    files.mkdir(exist_ok=True)
    for path in files.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in known:
            path.unlink()


def sync(folder: Path) -> None:
    """Everything on disk before the rename says that it is."""
    for path in [*folder.rglob("*"), folder]:
        sync_one(path)


def sync_one(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(files: Path, output: Path, partial: Path) -> None:
    """`files` becomes `output`, and an old `output` part of `partial`, in one step where the system has one."""
    if not output.exists():
        files.rename(output)
    elif not _exchange(files, output):
        output.rename(partial / "old")
        files.rename(output)
    sync_one(output.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names atomically; False where the system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))
