"""A Hub on the loopback that speaks the real protocol to the real client, with faults on demand.

Two servers: the Hub itself, and the store of large files on a port of its own, as in the world, so that redirects
leave the Hub and a token sent along would be seen.
"""

import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub.faults import Fault, flip, wait
from tests.hub.repos import Blob, Commit, Refused, Repo, Repos, is_large
from tests.hub.validation import problems
from tests.hub.xet import known_files

# token -> whose it is, and in which namespaces it may write
TOKENS: dict[str, tuple[str, set[str]]] = {
    "token-of-ann": ("ann", {"ann", "acme"}),
    "token-of-bob": ("bob", {"bob"}),
    "token-that-reads": ("ann", set()),
}


@dataclass(frozen=True)
class Request:
    """What a client sent, and what it got."""

    server: str  # "hub" or "store"
    method: str
    path: str
    query: dict[str, list[str]]
    authorization: str | None
    range: str | None
    received: int  # bytes
    sent: int
    status: int  # 0: none, the connection was dropped

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, **headers: str) -> Answer:
    return Answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **headers})


class Hub:
    """With `with`, a running one.

    Args:
        folder: where large files are kept.
        xet: whether files are uploaded by xet's protocol, to a store in a folder.
        part_bytes: large files beyond it come in parts of so many bytes.
    """

    def __init__(self, folder: Path, *, xet: bool = False, part_bytes: int | None = None):
        self.repos = Repos(folder)
        self.xet = folder / "xet" if xet else None
        self.part_bytes = part_bytes
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(name)) for name in ("hub", "store")]
        self.endpoint, self.store_endpoint = (f"http://127.0.0.1:{one.server_port}" for one in self._servers)

    def __enter__(self) -> "Hub":
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fault(self, pattern: str, kind: str, **how: Any) -> Fault:
        """The next requests whose `METHOD /path` matches `pattern` go wrong (see `faults.py`)."""
        self.faults.append(Fault(pattern, kind, **how))
        return self.faults[-1]

    def environment(self, home: Path, token: str | None = "token-of-ann") -> dict[str, str]:
        """What a client's process needs in its environment; its caches and login are in `home`."""
        home.mkdir(parents=True, exist_ok=True)
        if token:
            (home / "token").write_text(token)
        made = {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "30"}
        return {**made, "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"} | (
            {} if self.xet else {"HF_HUB_DISABLE_XET": "1"}
        )

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a revision holds (of files in xet's store, nothing)."""
        return {path: self._content(blob) for path, blob in self.repos.all[repo].find(revision).files.items()}

    def history(self, repo: str, revision: str = "main") -> list[str]:
        """Titles of its commits, last first."""
        return [commit.title for commit in self.repos.all[repo].history(revision)]

    def add(self, repo: str, files: dict[str, bytes], private: bool = False) -> str:
        """A commit made by someone else -> its digest."""
        from tests.hub.repos import regular

        with self.repos.lock:
            found = self.repos.all.get(repo) or self.repos.create(repo, private)
            head = found.find("main")
            blobs = {path: regular(content) for path, content in files.items()}
            return found.add("refs/heads/main", head, "by someone else", {**head.files, **blobs}).oid

    def _content(self, blob: Blob) -> bytes:
        if blob.content is not None:
            return blob.content
        stored = self.repos.stored(blob.sha256 or "")
        return stored.read_bytes() if stored else b""

    def _handler(self, name: str) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub, Handler.name, Handler.routes = hub, name, ROUTES[name]
        return Handler

    # -- who may do what

    def user(self, authorization: str | None) -> tuple[str, set[str]] | None:
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[token]

    def readable(self, name: str, authorization: str | None) -> Repo:
        user = self.user(authorization)
        repo = self.repos.all.get(name)
        if repo is None or (repo.private and (user is None or name.split("/")[0] not in {user[0], *user[1]})):
            raise Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def writable(self, name: str, authorization: str | None, pull_request: bool = False) -> Repo:
        repo = self.readable(name, authorization)
        user = self.user(authorization)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if not pull_request and name.split("/")[0] not in user[1]:
            raise Refused(403, "You don't have the rights to write in this repository.")
        return repo


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    name: str
    routes: list[Any]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        split = urlsplit(self.path)
        self.path_only, self.query = split.path, parse_qs(split.query)
        request = f"{self.command} {self.path_only}"
        fault = next((fault for fault in self.hub.faults if fault.strikes(request)), None)
        kind = fault.kind if fault else ""
        self.body = b""
        status = sent = 0
        try:
            self.body = self._read(half=kind == "drop-half" and self.command in ("PUT", "POST"))
            if kind == "call":
                fault.call()
            if kind == "slow":
                wait(fault)
            if kind == "stale":
                repo = re.search(r"/api/models/(.+?)/(?:commit|preupload)/", self.path_only)[1]
                self.hub.add(repo, {"meanwhile.txt": str(time.time()).encode()})
            if kind == "drop-before" or (kind == "drop-half" and self.command in ("PUT", "POST")):
                self._hang_up()
                return
            answer = self._refusal(fault) or self._answer()
            if kind == "drop-after":
                self._hang_up()
                return
            if kind == "corrupt":
                answer.body = flip(answer.body)
            status, sent = answer.status, self._send(answer, half=kind == "drop-half")
        except (BrokenPipeError, ConnectionError):
            self.close_connection = True
        finally:
            self.hub.requests.append(
                Request(
                    self.name,
                    self.command,
                    unquote(self.path_only),
                    self.query,
                    self.headers.get("Authorization"),
                    self.headers.get("Range"),
                    len(self.body),
                    sent,
                    status,
                )
            )

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _refusal(self, fault: Fault | None) -> Answer | None:
        if fault and fault.kind == "status":
            return Answer(fault.status, b'{"error":"on demand"}', {"X-Error-Message": "on demand"})
        if fault and fault.kind == "full":
            return Answer(507, b'{"error":"Insufficient storage"}', {"X-Error-Message": "Insufficient storage"})
        return None

    def _answer(self) -> Answer:
        try:
            for method, pattern, handle in self.routes:
                if self.command in method and (found := pattern.fullmatch(self.path_only)):
                    return handle(self, *(unquote(part) for part in found.groups()))
            raise Refused(404, f"no such route: {self.command} {self.path_only}")
        except Refused as refused:
            headers = {"X-Error-Message": str(refused)} | ({"X-Error-Code": refused.code} if refused.code else {})
            return Answer(refused.status, json.dumps({"error": str(refused)}).encode(), headers)

    def _read(self, half: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            chunks = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
                if half:
                    break
            else:
                self.rfile.readline()
            return b"".join(chunks)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length // 2 if half else length)

    def _send(self, answer: Answer, half: bool) -> int:
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return 0
        body = answer.body[: len(answer.body) // 2] if half else answer.body
        self.wfile.write(body)
        self.wfile.flush()
        if half:
            self._hang_up()
        return len(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")

    def told(self) -> Any:
        return json.loads(self.body or b"{}")


# -- routes: each takes the request and the parts of its path


def whoami(request: _Handler) -> Answer:
    user = request.hub.user(request.authorization)
    if user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"name": name, "type": "org"} for name in sorted(user[1] - {user[0]})]
    role = "write" if user[1] else "read"
    return as_json(
        {"type": "user", "name": user[0], "orgs": orgs, "auth": {"accessToken": {"displayName": "t", "role": role}}}
    )


def create(request: _Handler) -> Answer:
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


def validate(request: _Handler) -> Answer:
    errors, warnings = problems(request.told()["content"])
    answer = as_json(
        {"errors": [{"message": line} for line in errors], "warnings": [{"message": line} for line in warnings]}
    )
    answer.status = 400 if errors else 200
    return answer


def info(request: _Handler, name: str, revision: str = "main") -> Answer:
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


def tree(request: _Handler, name: str, revision: str, folder: str = "") -> Answer:
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


def paths_info(request: _Handler, name: str, revision: str) -> Answer:
    commit = request.hub.readable(name, request.authorization).find(revision)
    if request.headers.get("Content-Type", "").startswith("application/json"):
        paths = request.told()["paths"]
    else:
        paths = parse_qs(request.body.decode())["paths"]
    return as_json([entry(path, commit.files[path]) for path in paths if path in commit.files])


def refs(request: _Handler, name: str) -> Answer:
    repo = request.hub.readable(name, request.authorization)

    def those(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid}
            for ref, oid in repo.refs.items()
            if ref.startswith(prefix)
        ]

    found = {"branches": those("refs/heads/"), "tags": those("refs/tags/"), "converts": []}
    return as_json(found | ({"pullRequests": those("refs/pr/")} if "include_prs" in request.query else {}))


def commits(request: _Handler, name: str, revision: str) -> Answer:
    repo = request.hub.readable(name, request.authorization)
    date = "2024-01-01T00:00:00.000Z"
    return as_json(
        [
            {"id": one.oid, "title": one.title, "message": "", "date": date, "authors": [{"user": "ann"}]}
            for one in repo.history(revision)
        ]
    )


def branch(request: _Handler, name: str, branch: str) -> Answer:
    repo = request.hub.writable(name, request.authorization)
    with request.hub.repos.lock:
        if branch.startswith("refs/"):
            raise Refused(400, f"Invalid reference for a branch: {branch}")
        if f"refs/heads/{branch}" in repo.refs:
            raise Refused(409, f"Reference refs/heads/{branch} already exists")
        repo.refs[f"refs/heads/{branch}"] = repo.find(request.told().get("startingPoint", "main")).oid
    return as_json({})


def tag(request: _Handler, name: str, revision: str) -> Answer:
    repo = request.hub.writable(name, request.authorization)
    with request.hub.repos.lock:
        ref = f"refs/tags/{request.told()['tag']}"
        if ref in repo.refs:
            raise Refused(409, f"Tag reference exists already: {ref}")
        repo.refs[ref] = repo.find(revision).oid
    return as_json({})


def preupload(request: _Handler, name: str, revision: str) -> Answer:
    from base64 import b64decode

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


def batch(request: _Handler, name: str) -> Answer:
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


def _upload(hub: Hub, name: str, oid: str, size: int) -> dict[str, Any]:
    upload: dict[str, Any] = {"href": f"{hub.store_endpoint}/objects/{oid}"}
    if hub.part_bytes and size > hub.part_bytes:
        numbers = range(1, -(-size // hub.part_bytes) + 1)
        urls = {f"{number:05d}": f"{hub.store_endpoint}/objects/{oid}/{number}" for number in numbers}
        header = {"chunk_size": str(hub.part_bytes), **urls}
        upload = {"href": f"{hub.endpoint}/complete/{oid}", "header": header}
    return {"upload": upload, "verify": {"href": f"{hub.endpoint}/{name}.git/info/lfs/verify"}}


def verify(request: _Handler, name: str) -> Answer:
    told = request.told()
    file = request.hub.repos.stored(told["oid"])
    if file is None or file.stat().st_size != told["size"]:
        raise Refused(404, "the object is not there")
    return as_json({})


def put(request: _Handler, oid: str) -> Answer:
    request.hub.repos.keep(oid, request.body)
    return Answer()


def put_part(request: _Handler, oid: str, number: str) -> Answer:
    request.hub.parts[oid, int(number)] = request.body
    return Answer(headers={"ETag": f'"{oid[:8]}-{number}"'})


def complete(request: _Handler, oid: str) -> Answer:
    told = request.told()
    assert [part["etag"] for part in told["parts"]] == [f'"{oid[:8]}-{n + 1}"' for n in range(len(told["parts"]))]
    parts = [request.hub.parts.pop((oid, part["partNumber"])) for part in told["parts"]]
    request.hub.repos.keep(oid, b"".join(parts))
    return as_json({})


def xet_token(request: _Handler, name: str, kind: str, revision: str) -> Answer:
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


def commit(request: _Handler, name: str, revision: str) -> Answer:
    hub = request.hub
    pull_request = request.query.get("create_pr") == ["1"]
    repo = hub.writable(name, request.authorization, pull_request)
    lines = [json.loads(line) for line in request.body.splitlines() if line]
    xet = known_files(hub.xet) if hub.xet and hub.xet.is_dir() else {}
    made, number = hub.repos.commit(repo, revision, lines, pull_request, xet)
    url = f"{hub.endpoint}/{name}"
    told = {"success": True, "commitOid": made.oid, "commitUrl": f"{url}/commit/{made.oid}", "hookOutput": ""}
    return as_json(told | ({"pullRequestUrl": f"{url}/discussions/{number}"} if number else {}))


def resolve(request: _Handler, name: str, revision: str, path: str) -> Answer:
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


def stored(request: _Handler, oid: str) -> Answer:
    file = request.hub.repos.stored(oid)
    if file is None:
        raise Refused(404, "no such object")
    return _bytes(request, file.read_bytes(), oid, {"Accept-Ranges": "bytes"})


def _bytes(request: _Handler, content: bytes, etag: str, headers: dict[str, str]) -> Answer:
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
