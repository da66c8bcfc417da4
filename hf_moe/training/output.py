"""The folder of a run: filled under another name, which it loses when the run is done.

While `NAME` is made, `NAME.partial/files` holds its checkpoints, logs and recipe. A run that is killed or stops leaves
it if there is a checkpoint to go on from, else nothing.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from hf_moe.convert.conversion import RECIPE_NAME
from hf_moe.convert.output import check_output, locked, partial_of, replace, sync
from hf_moe.errors import OutputError, UsageError

from .checkpoints import last_checkpoint, remove_broken

GO_ON = "--resume_from_checkpoint true"


def check_free(output: Path, sources: list[Path], *, overwrite: bool, resume: bool) -> None:
    """Raises UsageError or OutputError where `output` can't be made: it exists, overlaps a source, or is half made."""
    check_output(output, sources, 0, overwrite)
    files = files_of(output)
    if any(path.is_file() for path in files.parent.rglob("*")) and not (files / RECIPE_NAME).is_file():
        raise UsageError(f"{files.parent}: is in the way, and was not left by an interrupted run; move it.")
    if not resume and not overwrite and last_checkpoint(files):
        raise UsageError(f"{files.parent}: is an interrupted run; {GO_ON} goes on with it, --overwrite starts anew.")


def files_of(output: Path) -> Path:
    """Where the files of `output` are while it is made."""
    return partial_of(output.resolve()) / "files"


@contextmanager
def run_folder(output: Path, recipe: str, *, resume: bool) -> Iterator[Path]:
    """The folder to fill, locked. It becomes `output` when the block ends well.

    Args:
        recipe: the resolved one; it marks the folder as ours.
        resume: whether what an earlier run left is kept.

    Raises:
        OutputError: where the file system refuses, or another run writes `output`.
    """
    output, files = output.resolve(), files_of(output)
    partial = files.parent
    try:
        with ExitStack() as undo:
            for folder in [parent for parent in reversed(output.parents) if not parent.exists()]:
                folder.mkdir()
                undo.callback(folder.rmdir)
            with locked(partial, output):
                try:
                    _prepare(files, recipe, resume)
                    yield files
                    sync(files)
                    replace(files, output, partial)
                except BaseException:
                    if last_checkpoint(files) is None:
                        with suppress(OSError):
                            shutil.rmtree(partial)
                    else:
                        undo.pop_all()
                    raise
                undo.pop_all()
                shutil.rmtree(partial)
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        raise OutputError(f"{output}: can't be written ({error.strerror or error}{where}).") from error


def _prepare(files: Path, recipe: str, resume: bool) -> None:
    if files.exists() and not resume:
        shutil.rmtree(files)
    files.mkdir(exist_ok=True)
    (files / RECIPE_NAME).write_text(recipe, encoding="utf-8")
    remove_broken(files)
