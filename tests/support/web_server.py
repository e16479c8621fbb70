"""A web server that sends ranges of files, or does with requests for them what servers do that send none."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the server does with a request for a range.
HONEST = ("ranges", "aligned", "no header", "no length")
WHOLE = ("whole", "refuses", "unsatisfiable", "later", "gzip")


class WebServer(ThreadingHTTPServer):
    """Serves files from memory and counts.

    Attributes
    ----------
    files : dict
        Bytes by path, without the slash at the beginning.
    habit : str
        One of `HONEST` or `WHOLE`; or "cut" for a body that ends early, `cuts` times, or "less" for less than was requested.
    requests : list of (str, str, int)
        Method, header Range, and how many bytes the body of the answer has.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], habit: str = "ranges", cuts: int = 10**9) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.habit, self.cuts = files, habit, cuts
        self.requests: list[tuple[str, str, int]] = []

    @property
    def url(self) -> str:
        """Of its root."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


@contextmanager
def serving(files: dict[str, bytes], habit: str = "ranges", cuts: int = 10**9) -> Iterator[WebServer]:
    """A server that runs until the end of the block."""
    server = WebServer(files, habit, cuts)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.server.requests.append((self.command, self.headers.get("Range", ""), len(body)))
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        is_cut = self.server.habit == "cut" and self.server.cuts > 0 and self.headers.get("Range")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if is_cut:
            self.server.cuts -= 1
            self.close_connection = True
        self.wfile.write(body[: len(body) // 2] if is_cut else body)

    def do_GET(self) -> None:
        habit, data = self.server.habit, self.server.files.get(self.path.lstrip("/"))
        if data is None:
            self._send(404)
            return
        wanted = self.headers.get("Range")
        if wanted is None or habit == "whole":
            self._send(200, data)
            return
        first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        if habit == "refuses":
            self._send(501)
        elif habit == "unsatisfiable" or first >= len(data):
            self._send(416, Content_Range=f"bytes */{len(data)}")
        else:
            self._send_range(data, first, min(last + 1, len(data)))

    def _send_range(self, data: bytes, start: int, stop: int) -> None:
        habit, total = self.server.habit, str(len(data))
        if habit == "aligned":
            start -= start % 4096
        elif habit == "later":
            start = min(start + 3, stop - 1)
        elif habit == "less":
            stop = start + (stop - start) // 2
        elif habit == "no length":
            total = "*"
        body = gzip.compress(data)[start:stop] if habit == "gzip" else data[start:stop]
        headers = {} if habit == "no header" else {"Content_Range": f"bytes {start}-{stop - 1}/{total}"}
        self._send(206, body, **headers, **({"Content_Encoding": "gzip"} if habit == "gzip" else {}))

    do_HEAD = do_GET  # noqa: N815
