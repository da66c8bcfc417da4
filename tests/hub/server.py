"""A Hub on the loopback that speaks the real protocol to the real client, with faults on demand.

Two servers: the Hub itself, and the store of large files on a port of its own, as in the world, so that redirects
leave the Hub and a token sent along would be seen.
"""

import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub.faults import Fault, flip, wait
from tests.hub.messages import Answer, Request
from tests.hub.repos import Blob, Refused, Repo, Repos, regular
from tests.hub.routes import ROUTES

# token -> whose it is, and in which namespaces it may write
TOKENS: dict[str, tuple[str, set[str]]] = {
    "token-of-ann": ("ann", {"ann", "acme"}),
    "token-of-bob": ("bob", {"bob"}),
    "token-that-reads": ("ann", set()),
}


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
        return type("Handler", (Handler,), {"hub": self, "name": name, "routes": ROUTES[name]})

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


class Handler(BaseHTTPRequestHandler):
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
