"""What a Hub holds: repositories, their commits, branches, tags and pull requests, and the store of large files."""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What goes to the store of large files by its name; and anything binary, or larger than this.
LARGE_NAMES = re.compile(r"\.(safetensors|bin|onnx|h5|gguf|png|npy|pt|zip|model)$")
LARGE_BYTES = 10 * 2**20
NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_][\w.-]{0,94}[A-Za-z0-9_]|[A-Za-z0-9_]")


class Refused(Exception):
    """An answer that is no success: status, a code the client knows, and a sentence."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Blob:
    """A file at a commit: its bytes, or where it is in the store (`sha256`), or in xet's."""

    size: int
    oid: str
    content: bytes | None = None
    sha256: str | None = None
    xet: str | None = None

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, Blob]


@dataclass
class Repo:
    name: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit

    def find(self, revision: str) -> Commit:
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if revision in self.commits:
            return self.commits[revision]
        raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """Last commit first."""
        found = [self.find(revision)]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def add(self, ref: str, parent: Commit | None, title: str, files: dict[str, Blob]) -> Commit:
        told = json.dumps([self.name, parent and parent.oid, title, sorted((k, v.oid) for k, v in files.items())])
        commit = Commit(hashlib.sha1(told.encode()).hexdigest(), parent and parent.oid, title, files)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit


def regular(content: bytes) -> Blob:
    return Blob(len(content), hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(), content)


def large(sha256: str, size: int, xet: str | None = None) -> Blob:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n"
    return Blob(size, regular(pointer.encode()).oid, sha256=sha256, xet=xet)


def is_large(path: str, size: int, sample: bytes) -> bool:
    return bool(size and (LARGE_NAMES.search(path) or size > LARGE_BYTES or b"\0" in sample))


class Repos:
    """All repositories; every change happens under one lock, so that a commit is seen whole or not at all."""

    def __init__(self, folder: Path):
        self.lock = threading.RLock()
        self.store = folder / "store"
        self.store.mkdir(parents=True)
        self.all: dict[str, Repo] = {}

    def create(self, name: str, private: bool) -> Repo:
        with self.lock:
            if not all(NAME.fullmatch(part) for part in name.split("/")):
                raise Refused(400, f"Invalid repo name: {name}")
            repo = self.all[name] = Repo(name, private)
            attributes = regular(b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n")
            repo.add("refs/heads/main", None, "initial commit", {".gitattributes": attributes})
            return repo

    def stored(self, sha256: str) -> Path | None:
        file = self.store / sha256
        return file if file.is_file() else None

    def keep(self, sha256: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != sha256:
            raise Refused(400, "the bytes do not have the digest that was announced")
        (self.store / sha256).write_bytes(content)

    def commit(
        self, repo: Repo, revision: str, lines: list[dict[str, Any]], create_pr: bool, xet: dict[str, str]
    ) -> tuple[Commit, int | None]:
        """Returns the commit, and the number of its pull request."""
        with self.lock:
            parent = repo.find(revision)
            header = next(line["value"] for line in lines if line["key"] == "header")
            expected = header.get("parentCommit")
            if expected and expected != parent.oid and not create_pr:
                raise Refused(412, "A commit has happened since. Please refresh and try again.")
            files = dict(parent.files)
            for line in lines:
                self._apply(files, line["key"], line["value"], xet)
            number = None
            ref = f"refs/heads/{revision}"
            if create_pr:
                number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
                ref = f"refs/pr/{number}"
            elif ref not in repo.refs:
                ref = revision  # a pull request's own
                if ref not in repo.refs:
                    raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return repo.add(ref, parent, header["summary"], files), number

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any], xet: dict[str, str]) -> None:
        if key == "file":
            files[value["path"]] = regular(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            sha256 = value["oid"]
            if self.stored(sha256) is None and sha256 not in xet:
                raise Refused(
                    400,
                    f"an LFS pointer pointed to a file that does not exist: {value['path']}",
                )
            files[value["path"]] = large(sha256, value["size"], xet.get(sha256))
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
        elif key == "deletedFolder":
            for path in [path for path in files if path.startswith(value["path"].rstrip("/") + "/")]:
                del files[path]
