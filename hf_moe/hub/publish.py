"""From a folder to the Hub: staged, checked, and sent in one commit."""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from hf_moe.errors import UsageError

from . import card as cards
from .checks import check_loads
from .client import api_at, check_repo_id, explained
from .facts import gather
from .lineage import Base, find_bases, look_up, of_artefact, pin
from .staging import CARD, EXPERTS_CONFIG, Staged, digest_weights, is_allowed, seal, sources_of, stage

MAIN = "main"
KEPT = (CARD, "LICEN", "COPYING", "NOTICE", "USE_POLICY")  # on the Hub, though the folder may have none
MESSAGE = "Published by hf_moe"
Said = Callable[[str], None]


@dataclass(frozen=True)
class Published:
    """What was sent, or would be.

    Args:
        repo_id: the repository.
        files: name -> bytes.
        left_out: what the folder has besides, and stays at home.
        removed: files of an earlier version that the commit takes away.
        compared: how many values of the outputs were found the same in a clean process; None: not looked.
        url: of the commit; None for a dry run.
        commit: its digest.
        pull_request: its address.
        changed: whether there was anything to send.
        card: the card's text, where one was made.
    """

    repo_id: str
    files: dict[str, int]
    left_out: list[str]
    removed: list[str] = field(default_factory=list)
    compared: int | None = None
    url: str | None = None
    commit: str | None = None
    pull_request: str | None = None
    changed: bool = False
    card: str | None = None


def publish(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    commit_message: str | None = None,
    tags: Sequence[str] = (),
    endpoint: str | None = None,
    base_model: Sequence[str] = (),
    reports: Sequence[str | os.PathLike[str]] = (),
    card: bool = True,
    progress: Said = lambda stage: None,
) -> Published:
    """Publishes a folder with a model, or with single experts, in one commit.

    What goes is on a list of names (`staging.ALLOWED`). Before anything is sent, it is loaded in a clean process and
    gives the same outputs, bit for bit. A run that was interrupted goes on where it stopped: what has arrived is not
    sent twice. The token is the one that `hf auth login` keeps.

    Args:
        path: the folder.
        repo_id: OWNER/NAME, or NAME of one's own; made where there is none.
        private: whether a new repository is; None: as the Hub has it.
        revision: the branch, made where there is none. [default: main]
        create_pr: as a pull request, which needs no right to write.
        dry_run: say what would be sent, and its card; send nothing, ask nobody.
        commit_message: of the commit.
        tags: names for the commit.
        endpoint: another Hub.
        base_model: which repository a base is, where it was a folder (`lineage.find_bases`).
        reports: folders with a routing report or an evaluation, published along.
        card: whether a card is made.
        progress: is told each stage.

    Raises:
        UsageError, SourceError: where the folder can't be published, in one line.
        HubError: where the Hub refuses or is out of reach.
    """
    check_repo_id(repo_id)
    if create_pr and tags:
        raise UsageError("a pull request can't be tagged; tag it when it is merged.")
    if create_pr and revision not in (None, MAIN):
        raise UsageError("a pull request is made against the main branch; leave out the revision.")
    source, api = Path(path).expanduser(), api_at(endpoint)
    with tempfile.TemporaryDirectory(prefix="hf-moe-publish-") as scratch:
        progress("staging")
        staged = stage(source, Path(scratch), reports=[Path(report).expanduser() for report in reports])
        progress("digesting")
        digest_weights(staged)
        if not dry_run:
            repo_id = _full_name(repo_id, api)
        text = None
        if card or staged.is_artefact:
            bases = _bases(staged, base_model, None if dry_run else api)
        if card:
            text = cards.render(gather(staged, repo_id, bases))
            (staged.folder / CARD).write_text(text, encoding="utf-8")
        seal(staged)
        files = staged.files
        if dry_run:
            return Published(repo_id, files, staged.left_out, card=text)
        progress("loading in a clean process")
        compared = check_loads(staged)
        progress("sending")
        sent = _send(
            staged,
            repo_id,
            api,
            private=private,
            revision=revision or MAIN,
            create_pr=create_pr,
            message=commit_message or MESSAGE,
            tags=tags,
        )
    return Published(repo_id, files, staged.left_out, compared=compared, card=text, **sent)


def make_card(
    path: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model: Sequence[str] = (),
    reports: Sequence[str | os.PathLike[str]] = (),
) -> str:
    """The card that `publish` would make, without what only the bases' repositories know."""
    made = publish(path, repo_id, dry_run=True, base_model=base_model, reports=reports)
    assert made.card is not None
    return made.card


def _full_name(repo_id: str, api: HfApi) -> str:
    with explained(repo_id):
        user = api.whoami()["name"]
    return repo_id if "/" in repo_id else f"{user}/{repo_id}"


def _bases(staged: Staged, base_model: Sequence[str], api: HfApi | None) -> list[Base]:
    """What the folder comes from; with `api`, looked up there, and of single experts written down."""
    found = of_artefact(staged.folder, EXPERTS_CONFIG) if staged.is_artefact else sources_of(staged.config)
    bases = find_bases(found, base_model, staged.source)
    if api is None:
        return bases
    bases = look_up(bases, api)
    if staged.is_artefact:
        pin(staged.folder, EXPERTS_CONFIG, bases[0], api)
    return bases


def _send(
    staged: Staged,
    repo_id: str,
    api: HfApi,
    *,
    private: bool | None,
    revision: str,
    create_pr: bool,
    message: str,
    tags: Sequence[str],
) -> dict[str, Any]:
    with explained(repo_id):
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision != MAIN:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = api.model_info(repo_id, revision=revision)
        there = [one.rfilename for one in before.siblings or []]
        removed = sorted(name for name in there if _is_stale(name, staged))
        done = api.create_commit(
            repo_id,
            [*_additions(staged), *(CommitOperationDelete(name) for name in removed)],
            commit_message=message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=None if create_pr else before.sha,
        )
        for tag in tags:
            _tag(api, repo_id, tag, done.oid)
    return {
        "removed": removed,
        "url": str(done.commit_url),
        "commit": done.oid,
        "pull_request": done.pr_url,
        "changed": done.oid != before.sha,
    }


def _additions(staged: Staged) -> list[CommitOperationAdd]:
    made = []
    for name in staged.files:
        addition = CommitOperationAdd(name, str((staged.folder / name).resolve()))
        addition.upload_info.sha256 = bytes.fromhex(staged.sha256[name])  # so that it is not read once more for it
        made.append(addition)
    return made


def _is_stale(name: str, staged: Staged) -> bool:
    """Whether a file on the Hub is an earlier version's, such as the one file of weights that are in shards now, which
    would be loaded instead of them."""
    if name in staged.files or name.startswith(KEPT):
        return False
    return is_allowed(name) or (name.endswith(".py") and ("_moe." in name or name.startswith("moe_")))


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    try:
        api.create_tag(repo_id, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        refs = api.list_repo_refs(repo_id).tags
        if next((one.target_commit for one in refs if one.name == tag), None) != commit:
            raise UsageError(f"{repo_id}: was published, but the tag {tag!r} is another commit's already.") from error
