"""A real S3 server for the tests, and a proxy before it that counts requests and makes faults.

The server is SeaweedFS, one binary from the package index. All workers of a test run share one: a keeper process starts it, and stops it
when the last of them has closed its connection, which the operating system does for one that is killed.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import json
import os
import selectors
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

ADMIN = {"key": "adminkey0001", "secret": "admin-secret-0001"}
READER = {"key": "readerkey001", "secret": "reader-secret-001"}
GETTER = {"key": "getterkey001", "secret": "getter-secret-001"}  # may read, and not list
ANON = {"anon": True}
BUCKETS = ("team", "pub")
IDENTITIES: dict[str, Any] = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ADMIN["key"], "secretKey": ADMIN["secret"]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER["key"], "secretKey": READER["secret"]}],
            "actions": ["Read", "List"],
        },
        {"name": "getter", "credentials": [{"accessKey": GETTER["key"], "secretKey": GETTER["secret"]}], "actions": ["Read"]},
        {"name": "anonymous", "actions": ["Read:pub", "List:pub"]},
    ]
}


def find_weed() -> str | None:
    """The server's binary, from this environment or the path."""
    return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [int(bound.getsockname()[1]) for bound in sockets]


# ------------------------------------------------------------------------------------------------------------- the server


def server_of(folder: Path, kind: str = "s3") -> tuple[str, socket.socket]:
    """The endpoint of the server whose keeper lies in a folder, started where there is none; it runs while the socket is open."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        note = folder / "keeper.json"
        for _ in range(2):
            with contextlib.suppress(OSError, ValueError):
                connection = socket.create_connection(("127.0.0.1", json.loads(note.read_text())["port"]), timeout=5)
                endpoint = connection.makefile().readline().strip()
                if endpoint:
                    return endpoint, connection
                connection.close()
            _start_keeper(folder, note, kind)
    raise RuntimeError(f"no server came up: see {folder}/server.log")


def _start_keeper(folder: Path, note: Path, kind: str) -> None:
    note.unlink(missing_ok=True)
    with (folder / "server.log").open("ab") as log:
        keeper = subprocess.Popen([sys.executable, __file__, str(folder), kind], stdout=log, stderr=log, start_new_session=True)
    until = time.monotonic() + 120
    while not note.exists():
        if keeper.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"the server did not start\n{(folder / 'server.log').read_text()[-2000:]}")
        time.sleep(0.1)
    threading.Thread(target=keeper.wait, daemon=True).start()  # so that it leaves no zombie


def keep(folder: Path, kind: str) -> None:
    """Start a server and stop it when all who came have gone."""
    import cloud_servers

    listener = socket.create_server(("127.0.0.1", 0))
    data = folder / f"data-{os.getpid()}"
    server, endpoint = {"s3": _start_weed, **cloud_servers.STARTED_BY}[kind](data)
    try:
        draft = folder / "keeper.draft"
        draft.write_text(json.dumps({"port": listener.getsockname()[1], "pid": os.getpid()}))
        draft.replace(folder / "keeper.json")
        _wait_for_all(listener, endpoint, server)
    finally:
        (folder / "keeper.json").unlink(missing_ok=True)
        listener.close()
        os.killpg(server.pid, signal.SIGKILL)  # nothing in it is worth an orderly end
        server.wait()
        shutil.rmtree(data, ignore_errors=True)


def _wait_for_all(listener: socket.socket, endpoint: str, server: subprocess.Popen[bytes]) -> None:
    watched, came = selectors.DefaultSelector(), False
    watched.register(listener, selectors.EVENT_READ)
    idle_until = time.monotonic() + 60
    while server.poll() is None and (len(watched.get_map()) > 1 or (not came and time.monotonic() < idle_until)):
        for chosen, _ in watched.select(timeout=1):
            if chosen.fileobj is listener:
                connection, _ = listener.accept()
                connection.sendall(f"{endpoint}\n".encode())
                watched.register(connection, selectors.EVENT_READ)
                came = True
            else:
                gone: Any = chosen.fileobj
                with contextlib.suppress(OSError):
                    if gone.recv(1):
                        continue
                watched.unregister(gone)
                gone.close()


def _start_weed(data: Path) -> tuple[subprocess.Popen[bytes], str]:
    data.mkdir(parents=True)
    (data / "s3.json").write_text(json.dumps(IDENTITIES))
    names = [f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")]
    names += ["s3.port.iceberg", "s3.port.lance"]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(find_weed()), "-logtostderr=true", "-v=0", "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer"]
    command += ["-s3", f"-s3.config={data / 's3.json'}", "-volume.max=50", "-master.volumeSizeLimitMB=256", "-master.telemetry=false"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, cwd=data, env={**os.environ, "HOME": str(data)})
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    try:
        _wait_until_up(server, endpoint)
    except BaseException:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        raise
    return server, endpoint


def _wait_until_up(server: subprocess.Popen[bytes], endpoint: str) -> None:
    import s3fs

    until = time.monotonic() + 90
    while True:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", urlsplit(endpoint).port or 80), timeout=2).close()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)
            continue
        # Buckets made, an object put and removed: then every part of the server is there.
        try:
            made = s3fs.S3FileSystem(**ADMIN, endpoint_url=endpoint, skip_instance_cache=True)
            for bucket in BUCKETS:
                with contextlib.suppress(FileExistsError):
                    made.mkdir(bucket)
                made.pipe_file(f"{bucket}/.up", b"up")
                made.rm_file(f"{bucket}/.up")
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.2)
            continue
        return


# -------------------------------------------------------------------------------------------------------------- the proxy


@dataclass(frozen=True)
class Request:
    """One request as the proxy saw it."""

    method: str
    path: str
    query: str
    range: str = ""
    payer: str = ""

    @property
    def kind(self) -> str:
        """GET, HEAD, PUT, POST, DELETE; LIST for a GET that lists, on S3, Google or Azure."""
        query = parse_qs(self.query, keep_blank_values=True)
        lists = "list-type" in query or query.get("comp") == ["list"] or self.path.endswith("/o")
        return "LIST" if self.method == "GET" and lists else self.method


@dataclass
class Fault:
    """What to do with a request instead of, or after, handing it on.

    Parameters
    ----------
    status, code : int, str
        Answer with this error; 0 for none.
    cut : int, optional
        Close the connection after so many bytes of the answer's body.
    lose_answer : bool
        Hand the request on, and close the connection instead of answering.
    delay : float
        Seconds to wait first.
    whole : bool
        Hand the request on without its header Range, as servers do that know none.
    """

    status: int = 0
    code: str = ""
    cut: int | None = None
    lose_answer: bool = False
    delay: float = 0.0
    whole: bool = False


def as_xml(fault: Fault) -> tuple[str, bytes]:
    """Type and text of a refusal, as S3 and Azure write it."""
    return "application/xml", f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{fault.code}</Message></Error>".encode()


class Proxy(ThreadingHTTPServer):
    """Hands requests on to a server, host name and body untouched so that signatures hold."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: str, refusal: Callable[[Fault], tuple[str, bytes]] = as_xml) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refusal = refusal
        self.upstream = endpoint
        self.target = urlsplit(endpoint).netloc
        self.requests: list[Request] = []
        self.bytes_sent = 0
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.fault: Callable[[Request], Fault | None] = lambda request: None
        self.open: set[socket.socket] = set()

    @property
    def endpoint(self) -> str:
        """The URL to give as endpoint_url."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def kinds(self) -> Counter[str]:
        """How many requests of each kind."""
        with self.lock:
            return Counter(request.kind for request in self.requests)

    def reset(self) -> None:
        """Count from zero, without faults, once what this process has begun in the background has its answer."""
        from lmprobe_zarr.storage import threads  # in the function: the keeper of a server, which is this file too, needs no package

        pools = [pool for (pid, is_local, _), pool in list(threads._pools.items()) if pid == os.getpid() and not is_local]
        end = time.monotonic() + 10
        while any(pool._idle_semaphore._value < len(pool._threads) for pool in pools) and time.monotonic() < end:
            time.sleep(0.001)
        with self.lock:
            self.requests.clear()
            self.bytes_sent = 0
            self.most_at_once = 0
            self.fault = lambda request: None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        """Serve until the end of the block."""
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.shutdown()
            thread.join()
            with self.lock:
                for opened in list(self.open):
                    with contextlib.suppress(OSError):
                        opened.shutdown(socket.SHUT_RDWR)
            self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 2**16
    server: Proxy
    upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open.add(self.connection)

    def finish(self) -> None:
        with self.server.lock:
            self.server.open.discard(self.connection)
        if self.upstream is not None:
            self.upstream.close()
        with contextlib.suppress(OSError):
            super().finish()

    def log_message(self, *args: Any) -> None:
        pass

    def handle_expect_100(self) -> bool:
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def _forward(self) -> None:
        parts = urlsplit(self.path)
        request = Request(
            self.command, parts.path, parts.query, self.headers.get("Range") or "", self.headers.get("x-amz-request-payer") or ""
        )
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with self.server.lock:
            self.server.requests.append(request)
            self.server.at_once += 1
            self.server.most_at_once = max(self.server.most_at_once, self.server.at_once)
            fault = self.server.fault(request) or Fault()
        try:
            self._answer(body, fault)
        finally:
            with self.server.lock:
                self.server.at_once -= 1

    def _answer(self, body: bytes, fault: Fault) -> None:
        if fault.delay:
            time.sleep(fault.delay)
        if fault.status:
            kind, text = self.server.refusal(fault)
            text = b"" if self.command == "HEAD" else text
            self._send(fault.status, [("Content-Type", kind), ("x-ms-error-code", fault.code)], len(text), text)
            return
        if fault.whole:
            del self.headers["Range"]
        status, headers, length, data = self._ask(body)
        if fault.lose_answer:
            self._hang_up()
        elif fault.cut is not None and len(data) > fault.cut:
            self._send(status, headers, length, data[: fault.cut])
            self._hang_up()
        else:
            self._send(status, headers, length, data)

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], int, bytes]:
        skipped = {"connection", "expect", "keep-alive", "proxy-connection"}
        for fresh in (False, True):
            if self.upstream is None or fresh:
                self.upstream = http.client.HTTPConnection(self.server.target, timeout=60)
            try:
                self.upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    if name.lower() not in skipped:
                        self.upstream.putheader(name, value)
                self.upstream.endheaders(body or None)
                answer = self.upstream.getresponse()
                data = answer.read()
                break
            except (http.client.RemoteDisconnected, ConnectionError):
                self.upstream.close()
                if fresh:
                    raise
        length = int(answer.headers.get("Content-Length") or len(data))
        kept = [
            (n, v.replace(self.server.upstream, self.server.endpoint) if n == "Location" else v)
            for n, v in answer.getheaders()
            if n.lower() not in {"content-length", "transfer-encoding", "connection"}
        ]
        return answer.status, kept, length, data

    def _send(self, status: int, headers: list[tuple[str, str]], length: int, data: bytes) -> None:
        with self.server.lock:
            self.server.bytes_sent += len(data)
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        # At once and with a reset, as a load balancer does.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _forward  # noqa: N815


@dataclass(frozen=True)
class S3:
    """The server as tests use it, and the proxy before it."""

    endpoint: str
    proxy: Proxy

    def options(self, identity: dict[str, Any] | None = None, *, counted: bool = False, **more: Any) -> dict[str, Any]:
        """storage_options of an identity, by default the one that may do everything."""
        return {**(ADMIN if identity is None else identity), "endpoint_url": self.proxy.endpoint if counted else self.endpoint, **more}


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    keep(Path(sys.argv[1]), sys.argv[2])
