"""Breaks the process at the N-th file operation: killed before it, killed half-way through a write, or refused."""

import builtins
import ctypes
import errno
import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

NAMES = (
    *("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "open", "write", "pwrite", "fsync", "ftruncate"),
    *("sendfile", "copy_file_range", "chmod", "link", "symlink", "truncate"),
)
WRITES = ("write", "pwrite", "file.write")
KILLED = 137


class Injector:
    """Args:
    at: number of the operation to break, from 1; 0 breaks none.
    how: "kill", "half" (of a write; else as "kill"), or the name of an errno, "ENOSPC" say.
    """

    def __init__(self, at: int, how: str):
        self.at, self.how, self.count = at, how, 0

    def install(self) -> None:
        """Patches this process, which should be a forked one."""
        for name in NAMES:
            setattr(os, name, self._wrapped(name, getattr(os, name)))
        real_open = builtins.open
        builtins.open = io.open = pathlib.io.open = lambda *a, **k: self._opened(real_open, *a, **k)
        real_dll = ctypes.CDLL
        ctypes.CDLL = lambda *a, **k: _Library(real_dll(*a, **k), self)

    def step(self, name: str, half: Callable[[], Any] | None = None) -> None:
        self.count += 1
        if self.count != self.at:
            return
        if self.how in ("kill", "half"):
            if self.how == "half" and half is not None:
                half()
            os._exit(KILLED)
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number))

    def _wrapped(self, name: str, real: Callable) -> Callable:
        def operation(*arguments, **options):
            if name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return real(*arguments, **options)  # reading breaks nothing
            half = None
            if name in WRITES:
                handle, data, *rest = arguments
                half = lambda: real(handle, memoryview(data)[: len(data) // 2 // 4096 * 4096], *rest)  # noqa: E731
            self.step(name, half)
            return real(*arguments, **options)

        return operation

    def _opened(self, real_open: Callable, file, mode="r", *arguments, **options):
        if not set(mode) & set("wax+"):
            return real_open(file, mode, *arguments, **options)
        self.step("open")
        return _File(real_open(file, mode, *arguments, **options), self)


class _File:
    """A file opened for writing, whose writes count."""

    def __init__(self, real, injector: Injector):
        self.real, self.injector = real, injector

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.real.close()

    def write(self, data):
        def half():
            self.real.write(data[: len(data) // 2])
            self.real.flush()

        self.injector.step("file.write", half)
        return self.real.write(data)


class _Library:
    """The C library, whose renameat2 counts."""

    def __init__(self, real, injector: Injector):
        self.real, self.injector = real, injector

    def __getattr__(self, name):
        function = getattr(self.real, name)
        if name != "renameat2":
            return function

        def operation(*arguments):
            self.injector.step(name)
            return function(*arguments)

        return operation


def run_forked(action: Callable[[], None], injector: Injector) -> tuple[int, str, int]:
    """`action` in a forked process under `injector` -> its exit status, what it raised, operations counted."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        report = os.write
        code, text = 0, ""
        try:
            injector.install()
            action()
        except BaseException as error:
            code, text = 1, f"{type(error).__name__}: {error}"
        report(writer, f"{injector.count}|{text}".encode())
        os._exit(code)
    os.close(writer)
    with open(reader, "rb") as pipe:
        count, _, text = pipe.read().decode().partition("|")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), text, int(count or 0)
