"""What the Hub answers: each route takes the request and the parts of its path."""

import json
import re
import time
from base64 import b64decode
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote

from tests.hub.messages import Answer, as_json
from tests.hub.repos import Blob, Commit, Refused, is_large
from tests.hub.validation import problems
from tests.hub.xet import known_files

if TYPE_CHECKING:
    from tests.hub.server import Handler, Hub


def whoami(request: "Handler") -> Answer:
    user = request.hub.user(request.authorization)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"name": name, "type": "org"} for name in sorted(user[1] - {user[0]})]
    role = "write" if user[1] else "read"
    return as_json(
        {"type": "user", "name": user[0], "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}
    )


def create(request: "Handler") -> Answer:
    told, user = request.told(), request.hub.user(request.authorization)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    namespace = told.get("organization") or user[0]
    if namespace not in user[1]:
        raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
    name = f"{namespace}/{told['name']}"
    answer = as_json({"url": f"{request.hub.endpoint}/{name}", "name": name, "id": name})
    if name in request.hub.repos.all:
        answer.status = 409  # with the address all the same
    else:
        request.hub.repos.create(name, told.get("visibility") == "private" or bool(told.get("private")))
    return answer


def validate(request: "Handler") -> Answer:
    errors, warnings = problems(request.told()["content"])
    answer = as_json(
        {"errors": [{"message": line} for line in errors], "warnings": [{"message": line} for line in warnings]}
    )
    answer.status = 400 if errors else 200
    return answer


def info(request: "Handler", name: str, revision: str = "main") -> Answer:
    repo = request.hub.readable(name, request.authorization)
    commit = repo.find(revision)
    siblings = [{"rfilename": path} for path in sorted(commit.files)]
    return as_json({"id": name, "modelId": name, "sha": commit.oid, "private": repo.private, "siblings": siblings})


def entry(path: str, blob: Blob) -> dict[str, Any]:
    made: dict[str, Any] = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
    if blob.sha256:
        made["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 127}
    if blob.xet:
        made["xetHash"] = blob.xet
    return made


def tree(request: "Handler", name: str, revision: str, folder: str = "") -> Answer:
    commit = request.hub.readable(name, request.authorization).find(revision)
    prefix = f"{folder}/" if folder else ""
    files = {path: blob for path, blob in sorted(commit.files.items()) if path.startswith(prefix)}
    if folder and not files:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
    folders = {prefix + path[len(prefix) :].split("/")[0] for path in files if "/" in path[len(prefix) :]}
    shown = [entry(path, blob) for path, blob in files.items() if recursive or "/" not in path[len(prefix) :]]
    return as_json(
        [*({"type": "directory", "path": one, "oid": "0" * 40, "size": 0} for one in sorted(folders)), *shown]
    )


def paths_info(request: "Handler", name: str, revision: str) -> Answer:
    commit = request.hub.readable(name, request.authorization).find(revision)
    if request.headers.get("Content-Type", "").startswith("application/json"):
        paths = request.told()["paths"]
    else:
        paths = parse_qs(request.body.decode())["paths"]
    return as_json([entry(path, commit.files[path]) for path in paths if path in commit.files])


def refs(request: "Handler", name: str) -> Answer:
    repo = request.hub.readable(name, request.authorization)

    def those(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    found = {"branches": those("refs/heads/"), "tags": those("refs/tags/"), "converts": []}
    return as_json(found | ({"pullRequests": those("refs/pr/")} if "include_prs" in request.query else {}))


def commits(request: "Handler", name: str, revision: str) -> Answer:
    repo = request.hub.readable(name, request.authorization)
    date = "2024-01-01T00:00:00.000Z"
    return as_json(
        [
            {"id": one.oid, "title": one.title, "message": "", "date": date, "authors": [{"user": "ann"}]}
            for one in repo.history(revision)
        ]
    )


def branch(request: "Handler", name: str, branch: str) -> Answer:
    repo = request.hub.writable(name, request.authorization)
    with request.hub.repos.lock:
        if branch.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        if f"refs/heads/{branch}" in repo.refs:
            raise Refused(409, f"Reference refs/heads/{branch} already exists")
        repo.refs[f"refs/heads/{branch}"] = repo.find(request.told().get("startingPoint", "main")).oid
    return as_json({})


def tag(request: "Handler", name: str, revision: str) -> Answer:
    repo = request.hub.writable(name, request.authorization)
    with request.hub.repos.lock:
        ref = f"refs/tags/{request.told()['tag']}"
        if ref in repo.refs:
            raise Refused(409, f"Tag reference exists already: {ref}")
        repo.refs[ref] = repo.find(revision).oid
    return as_json({})


def preupload(request: "Handler", name: str, revision: str) -> Answer:
    pull_request = "create_pr" in request.query
    commit = request.hub.writable(name, request.authorization, pull_request).find(revision)
    files = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if is_large(file["path"], file["size"], b64decode(file["sample"])) else "regular",
            "shouldIgnore": False,
            **({"oid": commit.files[file["path"]].etag} if file["path"] in commit.files else {}),
        }
        for file in request.told()["files"]
    ]
    return as_json({"files": files})


def batch(request: "Handler", name: str) -> Answer:
    hub = request.hub
    hub.writable(name, request.authorization, pull_request=True)
    told = request.told()
    objects = []
    for one in told["objects"]:
        made = {"oid": one["oid"], "size": one["size"]}
        if hub.repos.stored(one["oid"]) is None:
            made["actions"] = _upload(hub, name, one["oid"], one["size"])
        objects.append(made)
    several = any("chunk_size" in one.get("actions", {}).get("upload", {}).get("header", {}) for one in objects)
    return as_json({"transfer": "multipart" if several else "basic", "objects": objects})


def _upload(hub: "Hub", name: str, oid: str, size: int) -> dict[str, Any]:
    upload: dict[str, Any] = {"href": f"{hub.store_endpoint}/objects/{oid}"}
    if hub.part_bytes and size > hub.part_bytes:
        numbers = range(1, -(-size // hub.part_bytes) + 1)
        urls = {f"{number:05d}": f"{hub.store_endpoint}/objects/{oid}/{number}" for number in numbers}
        header = {"chunk_size": str(hub.part_bytes), **urls}
        upload = {"href": f"{hub.endpoint}/complete/{oid}", "header": header}
    return {"upload": upload, "verify": {"href": f"{hub.endpoint}/{name}.git/info/lfs/verify"}}


def verify(request: "Handler", name: str) -> Answer:
    told = request.told()
    file = request.hub.repos.stored(told["oid"])
    if file is None or file.stat().st_size != told["size"]:
        raise Refused(404, "the object is not there")
    return as_json({})


def put(request: "Handler", oid: str) -> Answer:
    request.hub.repos.keep(oid, request.body)
    return Answer()


def put_part(request: "Handler", oid: str, number: str) -> Answer:
    request.hub.parts[oid, int(number)] = request.body
    return Answer(headers={"ETag": f'"{oid[:8]}-{number}"'})


def complete(request: "Handler", oid: str) -> Answer:
    told = request.told()
    assert [part["etag"] for part in told["parts"]] == [f'"{oid[:8]}-{n + 1}"' for n in range(len(told["parts"]))]
    parts = [request.hub.parts.pop((oid, part["partNumber"])) for part in told["parts"]]
    request.hub.repos.keep(oid, b"".join(parts))
    return as_json({})


def xet_token(request: "Handler", name: str, kind: str, revision: str) -> Answer:
    hub = request.hub
    if hub.xet is None:
        raise Refused(404, "this Hub has no xet")
    if kind == "write":
        hub.writable(name, request.authorization, pull_request="create_pr" in request.query)
    else:
        hub.readable(name, request.authorization)
    told = {"casUrl": f"local://{hub.xet}", "exp": int(time.time()) + 3600, "accessToken": "xet"}
    headers = {
        "X-Xet-Cas-Url": told["casUrl"],
        "X-Xet-Token-Expiration": str(told["exp"]),
        "X-Xet-Access-Token": told["accessToken"],
    }
    return as_json(told, **headers)


def commit(request: "Handler", name: str, revision: str) -> Answer:
    hub = request.hub
    pull_request = request.query.get("create_pr") == ["1"]
    repo = hub.writable(name, request.authorization, pull_request)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    xet = known_files(hub.xet) if hub.xet and hub.xet.is_dir() else {}
    made, number = hub.repos.commit(repo, revision, lines, pull_request, xet)
    url = f"{hub.endpoint}/{name}"
    told = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    return as_json(told | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}))


def resolve(request: "Handler", name: str, revision: str, path: str) -> Answer:
    hub = request.hub
    found: Commit = hub.readable(name, request.authorization).find(revision)
    headers = {"X-Repo-Commit": found.oid, "Accept-Ranges": "bytes"}
    if path not in found.files:
        told = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", **headers}
        return Answer(404, b"Entry not found", told)
    blob = found.files[path]
    if blob.content is not None:
        return _bytes(request, blob.content, blob.etag, headers)
    headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(blob.size)}
    headers["Location"] = f"{hub.store_endpoint}/objects/{blob.sha256}"
    if blob.xet:
        headers["X-Xet-Hash"] = blob.xet
        headers["X-Xet-Refresh-Route"] = f"{hub.endpoint}/api/models/{name}/xet-read-token/{quote(found.oid)}"
    return Answer(302, b"", headers)


def stored(request: "Handler", oid: str) -> Answer:
    file = request.hub.repos.stored(oid)
    if file is None:
        raise Refused(404, "no such object")
    return _bytes(request, file.read_bytes(), oid, {"Accept-Ranges": "bytes"})


def _bytes(request: "Handler", content: bytes, etag: str, headers: dict[str, str]) -> Answer:
    headers = {**headers, "ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if request.command == "HEAD":
        return Answer(200, b"", {**headers, "Content-Length": str(len(content))})
    if not asked or asked.groups() == ("", ""):
        return Answer(200, content, headers)
    if asked[1]:
        start, end = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    else:
        start, end = max(0, len(content) - int(asked[2])), len(content) - 1
    if start > end:
        return Answer(416, b"", {**headers, "Content-Range": f"bytes */{len(content)}"})
    return Answer(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


REPO = "([^/]+/[^/]+)"
API = f"/api/models/{REPO}"
ROUTES: dict[str, list[Any]] = {
    "hub": [
        (methods.split("|"), re.compile(pattern), handle)
        for methods, pattern, handle in [
            ("GET", "/api/whoami-v2", whoami),
            ("POST", "/api/repos/create", create),
            ("POST", "/api/validate-yaml", validate),
            ("GET", f"{API}", info),
            ("GET", f"{API}/revision/([^/]+)", info),
            ("GET", f"{API}/tree/([^/]+)", tree),
            ("GET", f"{API}/tree/([^/]+)/(.+)", tree),
            ("POST", f"{API}/paths-info/([^/]+)", paths_info),
            ("GET", f"{API}/refs", refs),
            ("GET", f"{API}/commits/([^/]+)", commits),
            ("POST", f"{API}/branch/([^/]+)", branch),
            ("POST", f"{API}/tag/([^/]+)", tag),
            ("POST", f"{API}/preupload/([^/]+)", preupload),
            ("POST", f"{API}/commit/([^/]+)", commit),
            ("GET", f"{API}/xet-(read|write)-token/([^/]+)", xet_token),
            ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", batch),
            ("POST", rf"/{REPO}\.git/info/lfs/verify", verify),
            ("POST", r"/complete/(\w+)", complete),
            ("GET|HEAD", f"/{REPO}/resolve/([^/]+)/(.+)", resolve),
        ]
    ],
    "store": [
        (methods.split("|"), re.compile(pattern), handle)
        for methods, pattern, handle in [
            ("PUT", r"/objects/(\w{64})", put),
            ("PUT", r"/objects/(\w{64})/(\d+)", put_part),
            ("GET|HEAD", r"/objects/(\w{64})", stored),
        ]
    ],
}
