"""A server of the Hugging Face Hub's HTTP surface for tests, made from what `huggingface_hub` requests: repositories in memory, and faults.

No independent implementation is on the package index. Xet is not part of it: the client is told to do without (`HF_HUB_DISABLE_XET`), and
sends large files by the protocol of git LFS.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, STRANGER = "hf_SESAMEwriter", "hf_SESAMEreader", "hf_SESAMEstranger"
LARGE = 1000  # bytes from which on a file is one of LFS here
PIECE = 2**18  # of which an upload has parts, where it is larger


@dataclass
class Repo:
    """A repository: its commits, each a dictionary of all files, and what a revision's name means."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], title: str = "initial commit", branch: str = "main") -> str:
        """Add a commit with these files, and have a branch name it."""
        self.titles.append(title)
        sha = hashlib.sha1(f"{len(self.titles)} {title}".encode(), usedforsecurity=False).hexdigest()
        self.commits[sha] = files
        self.names[branch] = sha
        return sha

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.names.get(revision, revision))


@dataclass(frozen=True)
class HubRequest:
    """One request: its method and path, which part of the Hub it goes to, and the token that came with it."""

    method: str
    path: str
    kind: str
    token: str | None
    range: str = ""


@dataclass
class HubFault:
    """Answer with an error, hang up instead of answering, or after some bytes of the body."""

    status: int = 0
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    hang_up: bool = False
    cut: int | None = None
    body: str = '{"error": "made by a test"}'


class Hub(ThreadingHTTPServer):
    """The server; `repos` by kind and name, `objects` by the sha256 of their content."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.pieces: dict[tuple[str, int], bytes] = {}
        self.requests: list[HubRequest] = []
        self.fault: Callable[[HubRequest], HubFault | None] = lambda request: None
        self.lock = threading.RLock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def options(self, token: str | bool = WRITER) -> dict[str, Any]:
        """storage_options of somebody; False is nobody."""
        return {"endpoint": self.endpoint, "token": token}

    def kinds(self) -> Counter[str]:
        with self.lock:
            return Counter(request.kind for request in self.requests)

    def reset(self) -> None:
        with self.lock:
            self.requests.clear()
            self.fault = lambda request: None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    @contextlib.contextmanager
    def running(self) -> Iterator[Hub]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            self.server_close()


_ROUTES = {
    "create": r"POST /api/repos/create",
    "validate": r"POST /api/validate-yaml",
    "preupload": r"POST /api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/preupload/(?P<revision>[^/]+)",
    "commit": r"POST /api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/commit/(?P<revision>[^/]+)",
    "paths": r"POST /api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/paths-info/(?P<revision>[^/]+)",
    "tree": r"GET /api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?",
    "info": r"GET /api/(?P<kind>model|dataset|space)s/(?P<name>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?",
    "batch": r"POST /(?:(?P<kind>model|dataset|space)s/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
    "object": r"PUT /lfs/(?P<oid>\w+)",
    "piece": r"PUT /lfs/(?P<oid>\w+)/(?P<number>\d+)",
    "complete": r"POST /lfs/(?P<oid>\w+)",
    "verify": r"POST /lfs/(?P<oid>\w+)/verify",
    "bucket tree": r"GET /api/buckets/(?P<name>[^/]+/[^/]+)/tree(?:/(?P<path>.*))?",
    "bucket paths": r"POST /api/buckets/(?P<name>[^/]+/[^/]+)/paths-info",
    "bucket batch": r"POST /api/buckets/(?P<name>[^/]+/[^/]+)/batch",
    "bucket resolve": r"GET /buckets/(?P<name>[^/]+/[^/]+)/resolve/(?P<path>.*)",
    "cdn": r"GET /cdn/(?P<oid>\w+)",
    "resolve": r"GET /(?:(?P<kind>model|dataset|space)s/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.*)",
}
_WRITING = {"create", "preupload", "commit", "batch", "bucket batch"}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16
    server: Hub
    cut: int | None = None

    def log_message(self, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in (self.headers.get("Transfer-Encoding") or ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        tried = ((kind, re.fullmatch(route, f"{self.command} {parts.path}", re.DOTALL)) for kind, route in _ROUTES.items())
        kind, found = next((each for each in tried if each[1]), ("unknown", None))
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = HubRequest(self.command, parts.path, kind, token, self.headers.get("Range") or "")
        with self.server.lock:
            self.server.requests.append(request)
            fault = self.server.fault(request)
        self.cut = None
        if fault is not None and fault.hang_up:
            self.close_connection = True
            return
        if fault is not None and fault.status:
            self._send(fault.status, fault.body.encode(), {"X-Error-Code": fault.code, **fault.headers} if fault.code else fault.headers)
            return
        if fault is not None:
            self.cut = fault.cut
        if found is None:
            self._refuse(404, "", f"no such route: {self.path}")
            return
        given = {name: unquote(value) for name, value in found.groupdict().items() if value is not None}
        with self.server.lock:
            if self._may(kind, token, given):
                getattr(self, f"_{kind.replace(' ', '_')}")(given, parse_qs(parts.query), body)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _serve  # noqa: N815

    # ------------------------------------------------------------------------------------------------------------ rights

    def _may(self, kind: str, token: str | None, given: dict[str, str]) -> bool:
        if token is not None and not token.startswith("hf_SESAME"):
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if kind in _WRITING and token != WRITER:
            return self._refuse(403 if token else 401, "", "You need a token with the right to write")
        if "name" not in given:
            return True
        repo = self.server.repos.get(f"{'bucket' if kind.startswith('bucket') else given.get('kind', 'model')}s/{given['name']}")
        if repo is None or (repo.private and token not in (WRITER, READER)):
            return self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and kind in ("resolve", "tree", "paths") and token not in (WRITER, READER):
            return self._refuse(403 if token else 401, "GatedRepo", "Access to this dataset is restricted")
        self.repo = repo
        revision = given.get("revision", "main")
        if repo.files(revision) is None and (repo.titles or "revision" in given):
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        self.files = repo.files(revision) or {}
        return True

    def _refuse(self, status: int, code: str, message: str) -> bool:
        self._json(
            {"error": message},
            status,
            {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message.encode("ascii", "replace").decode()},
        )
        return False

    # ------------------------------------------------------------------------------------------------------------ routes

    def _create(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        wanted = json.loads(body)
        name = f"{wanted.get('type', 'model')}s/{wanted['organization']}/{wanted['name']}"
        url = f"{self.server.endpoint}/{name}"
        if name in self.server.repos:
            self._json({"error": "You already created this dataset repo", "url": url}, 409)
            return
        private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
        repo = self.server.repos[name] = Repo(private=private)
        repo.commit({".gitattributes": b"*.bin filter=lfs\n"})
        self._json({"url": url})

    def _validate(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        import yaml  # type: ignore[import-untyped]

        content = json.loads(body)["content"]
        found = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        try:
            wrong = found is not None and not isinstance(yaml.safe_load(found[1]), dict)
        except yaml.YAMLError:
            wrong = True
        self._json({"errors": [{"message": "no YAML"}] if wrong else [], "warnings": []}, 400 if wrong else 200)

    def _info(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        revision = given.get("revision", "main")
        sha = self.repo.names.get(revision, revision)
        self._json({"id": given["name"], "sha": sha, "private": self.repo.private, "gated": self.repo.gated, "tags": [], "downloads": 0})

    def _tree(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        prefix = f"{given['path'].rstrip('/')}/" if given.get("path") else ""
        below = [path for path in sorted(self.files) if path.startswith(prefix)]
        if prefix and not below:
            self._refuse(404, "EntryNotFound", f"{prefix} does not exist")
            return
        entries = {}
        for path in below:
            first, slash, _ = path.removeprefix(prefix).partition("/")
            if slash:
                entries[prefix + first] = {"type": "directory", "path": prefix + first, "oid": "0" * 40}
            if not slash or query.get("recursive", ["false"])[0].lower() in ("true", "1"):
                entries[path] = self._entry(path)
        start = int(query.get("cursor", ["0"])[0])
        page = list(entries.values())[start : start + 50]
        more = start + 50 < len(entries)
        kept = "&".join(f"{name}={value[0]}" for name, value in query.items() if name != "cursor")
        link = f'<{self.server.endpoint}{urlsplit(self.path).path}?{kept}&cursor={start + 50}>; rel="next"'
        self._json(page, 200, {"Link": link} if more else {})

    def _entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if len(data) >= LARGE:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _paths(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        text = body.decode()
        wanted = json.loads(text)["paths"] if text.startswith("{") else parse_qs(text)["paths"]
        self._json([self._entry(path) for path in wanted if path in self.files])

    def _resolve(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        data = self.files.get(given["path"])
        if data is None:
            self._refuse(404, "EntryNotFound", f"{given['path']} does not exist")
        elif len(data) >= LARGE:
            oid = hashlib.sha256(data).hexdigest()
            self.server.objects[oid] = data
            self._send(302, b"", {"Location": f"{self.server.endpoint}/cdn/{oid}?Signature=SESAMEsignature"})
        else:
            self._bytes(data)

    def _cdn(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        self._bytes(self.server.objects[given["oid"]])

    def _preupload(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        files = []
        for file in json.loads(body)["files"]:
            known = self.files.get(file["path"])
            mode = "lfs" if file["size"] >= LARGE else "regular"
            oid = None if known is None else _git_oid(known) if mode == "regular" else hashlib.sha256(known).hexdigest()
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": files})

    def _batch(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        objects = []
        for each in json.loads(body)["objects"]:
            oid, size = each["oid"], each["size"]
            where = f"{self.server.endpoint}/lfs/{oid}"
            actions: dict[str, Any] = {"upload": {"href": where}, "verify": {"href": f"{where}/verify"}}
            if size > PIECE:
                urls = {f"{number:05}": f"{where}/{number}" for number in range(1, -(-size // PIECE) + 1)}
                actions["upload"]["header"] = {"chunk_size": str(PIECE), **urls}
            objects.append({**each, **({} if oid in self.server.objects else {"actions": actions})})
        self._json({"transfer": "multipart", "objects": objects})

    def _object(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != given["oid"]:
            self._refuse(400, "", "another checksum")
            return
        self.server.objects[given["oid"]] = body
        self._send(200, b"", {"ETag": '"1"'})

    def _piece(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        self.server.pieces[given["oid"], int(given["number"])] = body
        self._send(200, b"", {"ETag": f'"{given["number"]}"'})

    def _complete(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        self._object(given, query, b"".join(self.server.pieces.pop((given["oid"], number)) for number in numbers))

    def _verify(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        self._json({}, 200 if given["oid"] in self.server.objects else 404)

    def _commit(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        files, title = dict(self.files), ""
        for line in body.splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                title = value["summary"]
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    self._refuse(400, "", f"no object {value['oid']}")
                    return
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                del files[value["path"]]
        sha = self.repo.commit(files, title, given["revision"])
        self._json({"commitUrl": f"{self.server.endpoint}/{given['name']}/commit/{sha}", "commitOid": sha, "success": True})

    # ----------------------------------------------------------------------------------------------------------- buckets

    def _bucket_entry(self, path: str) -> dict[str, Any]:
        data = self.files[path]
        uploaded = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        return {"type": "file", "path": path, "size": len(data), "xetHash": hashlib.sha256(data).hexdigest(), "uploadedAt": uploaded}

    def _bucket_tree(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        prefix, deep = given.get("path", ""), query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = {}
        for path in sorted(self.files):
            # By the beginning of a name, as the Hub does.
            if path.startswith(prefix):
                cut = path.find("/", len(prefix) + 1 if prefix else 0)
                folder = {"type": "directory", "path": path[:cut], "uploadedAt": "2026-01-01T00:00:00.000Z"}
                entries[path if deep or cut < 0 else path[:cut]] = self._bucket_entry(path) if deep or cut < 0 else folder
        self._json(list(entries.values()))

    def _bucket_paths(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        self._json([self._bucket_entry(path) for path in json.loads(body)["paths"] if path in self.files])

    def _bucket_resolve(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        if given["path"] not in self.files:
            self._refuse(404, "EntryNotFound", "no such file")
        else:
            self._bytes(self.files[given["path"]])

    def _bucket_batch(self, given: dict[str, str], query: dict[str, Any], body: bytes) -> None:
        for line in body.splitlines():
            step = json.loads(line)
            if step["type"] == "addFile":
                self.files[step["path"]] = self.server.objects[step["xetHash"]]
            else:
                self.files.pop(step["path"], None)
        self._json({"success": True, "failed": []})

    # ----------------------------------------------------------------------------------------------------------- answers

    def _bytes(self, data: bytes) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None:
            self._send(200, data, {})
            return
        start, stop = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
        if start >= len(data):
            self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return
        self._send(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.cut is not None and len(data) > self.cut:
            data, self.close_connection = data[: self.cut], True
        self.wfile.write(data)
        self.wfile.flush()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
