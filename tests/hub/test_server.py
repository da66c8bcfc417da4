"""The loopback Hub itself: the real client believes it."""

import json

import pytest

from tests.hub.server import Hub

SEND = """
import sys
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi()
folder, repo, pull = sys.argv[1], sys.argv[2], len(sys.argv) > 3
api.create_repo(repo, exist_ok=True)
from pathlib import Path
adds = [CommitOperationAdd(str(p.relative_to(folder)), p) for p in sorted(Path(folder).rglob("*")) if p.is_file()]
done = api.create_commit(repo, adds, commit_message="all", create_pr=pull)
print(done.oid, done.pr_url)
"""
FETCH = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], revision=sys.argv[2] if len(sys.argv) > 2 else None))
"""


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "folder"
    (made / "1_Pooling").mkdir(parents=True)
    (made / "config.json").write_text("{}")
    (made / "1_Pooling" / "config.json").write_text('{"a": 1}')
    (made / "model.safetensors").write_bytes(bytes(range(256)) * 100)
    (made / "README.md").write_text("---\nlicense: mit\n---\nWords.\n")
    return made


def contents(folder):
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".gitattributes"
    }


@pytest.mark.parametrize("form", [{}, {"part_bytes": 10_000}, {"xet": True}], ids=["basic", "parts", "xet"])
def test_what_is_sent_comes_back(form, client, folder, tmp_path):
    from pathlib import Path

    with Hub(tmp_path / "other", **form) as hub:
        oid, pull_request = client(SEND, folder, "ann/model", at=hub).split()
        assert pull_request == "None"
        got = Path(client(FETCH, "ann/model", at=hub, home=tmp_path / "fresh").strip())
        assert got.name == oid
        assert contents(got) == contents(folder)
        stored = [request for request in hub.requests if request.server == "store" and request.method == "PUT"]
        assert len(stored) == {"part_bytes": 3, "xet": 0}.get(next(iter(form), ""), 1)
        assert all(request.authorization is None for request in hub.requests if request.server == "store")
        before = sum(request.received for request in hub.requests)
        client(SEND, folder, "ann/model", at=hub)
        assert sum(request.received for request in hub.requests) - before < 10_000
        assert hub.history("ann/model") == ["all", "initial commit"]


def test_a_pull_request_leaves_the_branch_alone(hub, client, folder):
    hub.add("bob/model", {"config.json": b"{}"})
    oid, url = client(SEND.replace("api.create_repo(repo, exist_ok=True)", ""), folder, "bob/model", "pr").split()
    assert url == f"{hub.endpoint}/bob/model/discussions/1"
    assert "model.safetensors" not in hub.files("bob/model")
    assert hub.files("bob/model", "refs/pr/1")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    got = client(FETCH, "bob/model", "refs/pr/1")
    assert oid in got


def test_what_only_some_may_see_and_do(hub, client, folder):
    hub.add("ann/secret", {"config.json": b"{}"}, private=True)
    assert "RepositoryNotFoundError" in client(FETCH, "ann/secret", token="token-of-bob", ok=False).stderr
    assert "RepositoryNotFoundError" in client(FETCH, "ann/secret", token=None, ok=False).stderr
    client(FETCH, "ann/secret")
    assert "403" in client(SEND, folder, "ann/new", token="token-of-bob", ok=False).stderr
    assert "401" in client(SEND, folder, "ann/new", token="token-nobody-has", ok=False).stderr
    assert "ann/new" not in hub.repos.all


def test_a_card_that_is_no_yaml_is_refused(hub, client, folder):
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    assert "Invalid metadata in README.md" in client(SEND, folder, "ann/model", ok=False).stderr
    (folder / "README.md").write_text("---\nbase_model: ../x/y\n---\n")
    assert "base_model" in client(SEND, folder, "ann/model", ok=False).stderr
    assert hub.history("ann/model") == ["initial commit"]


def test_refs_tree_ranges_and_revisions(hub, client, folder):
    client(SEND, folder, "ann/model")
    code = """
import json, sys
from huggingface_hub import HfApi, get_session, hf_hub_url
api = HfApi()
api.create_branch("ann/model", branch="draft/one")
api.create_tag("ann/model", tag="v1", revision="draft/one")
refs = api.list_repo_refs("ann/model", include_pull_requests=True)
entries = api.list_repo_tree("ann/model", recursive=True, revision="v1")
tree = {one.path: one.size for one in entries if hasattr(one, "size")}
url = hf_hub_url("ann/model", "model.safetensors")
part = get_session().get(url, headers={"Range": "bytes=10-19"}, follow_redirects=True)
names = [[one.name for one in ones] for ones in (refs.branches, refs.tags)]
print(json.dumps([*names, tree, part.status_code, part.content.hex()]))
"""
    branches, tags, tree, status, part = json.loads(client(code))
    assert branches == ["main", "draft/one"]
    assert tags == ["v1"]
    assert tree["model.safetensors"] == 25600
    assert tree["1_Pooling/config.json"] == 8
    assert (status, part) == (206, bytes(range(10, 20)).hex())


@pytest.mark.parametrize(
    ("pattern", "kind"),
    [
        ("PUT /objects", "status"),
        ("PUT /objects", "drop-half"),
        ("POST .*/preupload", "drop-before"),
        ("GET .*/tree", "slow"),
    ],
)
def test_the_client_survives_what_passes(pattern, kind, hub, client, folder):
    fault = hub.fault(pattern, kind)
    client(SEND, folder, "ann/model")
    client(FETCH, "ann/model")
    assert fault.hits == 1
    assert contents_of(hub) == contents(folder)


@pytest.mark.parametrize(
    ("pattern", "kind", "told"),
    [
        ("POST .*/commit/", "status", "500"),
        ("POST .*/commit/", "drop-half", "disconnected"),
        ("PUT /objects", "full", "507"),
        ("POST .*/commit/", "drop-before", "disconnected"),
    ],
)
def test_what_does_not_pass_leaves_nothing_to_see(pattern, kind, told, hub, client, folder):
    hub.fault(pattern, kind)
    assert told in client(SEND, folder, "ann/model", ok=False).stderr
    assert hub.history("ann/model") == ["initial commit"]
    client(SEND, folder, "ann/model")
    assert contents_of(hub) == contents(folder)


def test_downloads_are_corrupted_unseen(hub, client, folder):
    """Why there is a manifest."""
    from pathlib import Path

    client(SEND, folder, "ann/model")
    hub.fault("GET /objects", "corrupt")
    got = Path(client(FETCH, "ann/model").strip())
    assert (got / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


def contents_of(hub):
    return {path: content for path, content in hub.files("ann/model").items() if path != ".gitattributes"}
