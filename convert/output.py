"""The output folder: checked before anything is written, filled under another name, renamed when it is whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from hf_moe.errors import OutputError, UsageError


def check_output(output: Path, source: Path, nbytes: int, overwrite: bool) -> None:
    """Refuses an output that exists, overlaps the source, or can't hold `nbytes`.

    Raises:
        UsageError, OutputError: in one line.
    """
    try:
        resolved, dense = output.resolve(), source.resolve()
        taken = output.exists() or output.is_symlink()
    except OSError as error:
        raise UsageError(f"{output}: can't be a folder ({error.strerror}).") from error
    if resolved == dense or resolved.is_relative_to(dense) or dense.is_relative_to(resolved):
        raise UsageError(f"{output}: overlaps the source {source}; choose a folder outside it.")
    if taken:
        if not overwrite:
            raise UsageError(f"{output}: exists already; --overwrite replaces it.")
        if output.is_symlink() or not output.is_dir():
            raise UsageError(f"{output}: is no folder, so it is not overwritten.")
        if any(output.iterdir()) and not (output / "config.json").is_file():
            raise UsageError(f"{output}: is neither empty nor a checkpoint, so it is not overwritten.")
    parent = _existing_parent(resolved)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: can't be written, {parent} is read-only.")
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise OutputError(f"{output}: needs {nbytes:,} bytes, but {parent} has {free:,} free.")


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in path.parents if parent.exists())


@contextmanager
def whole_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `output` in one rename when the block ends well, and vanishes when it doesn't.

    Raises:
        OutputError: where the file system refuses (read-only, no space left).
    """
    output = output.resolve()
    try:
        with ExitStack() as undo:
            for folder in _missing_parents(output):
                folder.mkdir()
                undo.callback(folder.rmdir)
            partial = _sibling(output, ".partial")
            undo.callback(shutil.rmtree, partial, ignore_errors=True)
            yield partial
            _sync(partial)
            partial.chmod(0o777 & ~_umask())
            _replace(partial, output)
            undo.pop_all()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise OutputError(f"{output}: can't be written ({error.strerror or error}{where}).") from error


def _sibling(output: Path, suffix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{output.name[:100]}.", suffix=suffix, dir=output.parent))


def _missing_parents(path: Path) -> list[Path]:
    """Outermost first."""
    return [parent for parent in reversed(path.parents) if not parent.exists()]


def _sync(folder: Path) -> None:
    """Everything on disk before the rename says that it is."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _replace(partial: Path, output: Path) -> None:
    """Renames `partial` to `output`; an old `output` steps aside first and is deleted last."""
    old = None
    if output.exists():
        old = _sibling(output, ".old")
        output.rename(old)
    try:
        partial.rename(output)
    except BaseException:
        if old is not None and not output.exists():
            old.rename(output)
        raise
    if old is not None:
        shutil.rmtree(old)
