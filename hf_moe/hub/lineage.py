"""What a model descends from: repositories, checked against the digests it was made with, and what is inherited."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.repocard import metadata_load

from hf_moe.convert.checkpoint import read_json
from hf_moe.errors import SourceError, UsageError

from .client import check_repo_id, explained

NONE = "none"
INHERITED = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True)
class Base:
    """A checkpoint that a model was made from.

    Args:
        source: what it was called when the model was made: a repository, or the name of a folder.
        revision: its commit, where it came from the Hub.
        sha256: its weights files -> digest.
        repo_id: its repository; None where nobody says so.
        metadata: what its card there says that is inherited.
    """

    source: str
    revision: str | None
    sha256: dict[str, str]
    repo_id: str | None
    metadata: dict[str, Any] = field(default_factory=dict)


def of_artefact(folder: Path, name: str) -> list[dict[str, Any]]:
    """The base of single experts, as `name` in their folder tells of it. Raises SourceError where it does not."""
    base = read_json(folder / name).get("base")
    if not isinstance(base, dict) or not isinstance(base.get("repo"), str) or not isinstance(base.get("files"), dict):
        raise SourceError(f"{folder}: {name} does not name its base.")
    return [{"source": base["repo"], "revision": base.get("commit"), "sha256": base["files"]}]


def pin(folder: Path, name: str, base: Base, api: HfApi) -> None:
    """Writes the repository and commit of the base of single experts, which whoever opens them will fetch.

    Raises:
        UsageError: where it has none.
    """
    if base.repo_id is None:
        raise UsageError(f"{base.source!r}: single experts need their base; name its repository with --base-model.")
    if base.revision is None:
        with explained(base.repo_id):
            commit = api.model_info(base.repo_id).sha
        told = read_json(folder / name)
        told["base"] |= {"repo": base.repo_id, "commit": commit}
        (folder / name).write_text(json.dumps(told, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def find_bases(sources: Iterable[dict[str, Any]], given: Sequence[str], where: Path) -> list[Base]:
    """The bases, each once, by what the model's files say and what the user adds.

    Args:
        given: REPO, where there is one base; SOURCE=REPO; or "none", which leaves out all that have no repository.

    Raises:
        UsageError: where a base is a folder of somebody's machine, or `given` names none of them.
    """
    named = dict(one.rpartition("=")[::2] for one in given if one != NONE)
    found: dict[str, Base] = {}
    for one in sources:
        source, revision = str(one["source"]), one.get("revision")
        repo_id = named.pop(source, None) or (source if revision else None)
        found.setdefault(source, Base(source, revision, one.get("sha256") or {}, repo_id))
    if "" in named and len(found) == 1:
        [base] = found.values()
        found = {base.source: Base(base.source, base.revision, base.sha256, named.pop(""))}
    if named:
        raise UsageError(f"--base-model names {next(iter(named))!r}, but the bases are {', '.join(found) or 'none'}.")
    for base in found.values():
        if base.repo_id is not None:
            check_repo_id(base.repo_id)
        elif NONE not in given:
            option = "--base-model " + ("REPO" if len(found) == 1 else f"{base.source}=REPO")
            raise UsageError(
                f"{where}: was made from the folder {base.source!r}, which others don't have; say which repository it "
                f"is with {option}, or leave it out of the card with --base-model {NONE}."
            )
    return list(found.values())


def look_up(bases: list[Base], api: HfApi) -> list[Base]:
    """The same with what their repositories say.

    Raises:
        SourceError: where a repository holds other weights than those the model was made from.
        HubError: where it is not there, or out of reach.
    """
    return [base if base.repo_id is None else _looked_up(base, base.repo_id, api) for base in bases]


def _looked_up(base: Base, repo_id: str, api: HfApi) -> Base:
    with explained(repo_id):
        entries = api.get_paths_info(repo_id, list(base.sha256), revision=base.revision) if base.sha256 else []
        for entry in entries:
            there = getattr(getattr(entry, "lfs", None), "sha256", None)
            if there is not None and there != base.sha256[entry.path]:
                raise SourceError(
                    f"{repo_id}: its {entry.path} is not the one that the model was made from: its sha256 is {there}, "
                    f"not {base.sha256[entry.path]}."
                )
        try:
            card = api.hf_hub_download(repo_id, "README.md", revision=base.revision)
            metadata = metadata_load(card) or {}
        except RemoteEntryNotFoundError:  # not the local one, which is raised where the connection is lost
            metadata = {}
    kept = {name: metadata[name] for name in INHERITED if metadata.get(name)}
    return Base(base.source, base.revision, base.sha256, repo_id, kept)


def inherited(bases: list[Base]) -> dict[str, Any]:
    """Licence and languages of the bases; where their licences differ it is `other`, and the card lists them."""
    metadata = [base.metadata for base in bases]
    licences = {tuple(one.get(name) for name in INHERITED[:3]) for one in metadata}
    known = [one for one in licences if one[0]]
    made: dict[str, Any] = {}
    if len(licences) == 1 and known:
        made = {name: value for name, value in zip(INHERITED, known[0], strict=False) if value}
    elif len(known) > 0 and len(licences) > 1:
        made = {"license": "other", "license_name": "those-of-the-bases"}
    languages: list[str] = []
    for one in metadata:
        given = one.get("language", [])
        languages += [str(language) for language in ([given] if isinstance(given, str) else given)]
    return made | ({"language": list(dict.fromkeys(languages))} if languages else {})
