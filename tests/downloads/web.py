"""A web server of the test: ranges, ETags, redirects, and the faults that real ones have."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["Page", "Web", "serve"]


@dataclass
class Page:
    """What is at a path.

    Attributes:
        data: The file.
        cuts: Bytes after which the connection ends, request by request.
        refusals: Status and Retry-After of the first requests.
        redirect: Where it is really.
        etag: Its ETag; empty for none.
        ranges: Whether `Range` is honoured.
        kind: Content-Type.
        linked: Whether a redirect says the SHA-256, as model hubs do.
    """

    data: bytes = b""
    cuts: list[int] = field(default_factory=list[int])
    refusals: list[tuple[int, str]] = field(default_factory=list[tuple[int, str]])
    redirect: str = ""
    etag: str = ""
    ranges: bool = True
    kind: str = "application/octet-stream"
    linked: str = ""


@dataclass
class Web:
    """The server: its pages by path, and what it was asked."""

    port: int
    pages: dict[str, Page]
    asked: list[tuple[str, dict[str, str]]] = field(
        default_factory=list[tuple[str, dict[str, str]]]
    )
    sent: dict[str, int] = field(default_factory=dict[str, int])

    def address(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


class Handler(BaseHTTPRequestHandler):
    """Answers from the pages of its `Web`."""

    web: Web
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_GET(self) -> None:
        self.web.asked.append((self.path, dict(self.headers)))
        page = self.web.pages.get(self.path)
        if page is None:
            self._end(404)
        elif page.refusals:
            code, after = page.refusals.pop(0)
            self._end(code, **({"Retry-After": after} if after else {}))
        elif page.redirect:
            more = {"X-Linked-ETag": f'"{page.linked}"'} if page.linked else {}
            self._end(302, Location=page.redirect, **more)
        else:
            self._file(page)

    def _end(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, page: Page) -> None:
        start, code = 0, 200
        wanted = self.headers.get("Range")
        if wanted and page.ranges and self.headers.get("If-Range") == page.etag != "":
            start, code = int(wanted.removeprefix("bytes=").removesuffix("-")), 206
            if start >= len(page.data):
                self._end(416, **{"Content-Range": f"bytes */{len(page.data)}"})
                return
        rest = page.data[start:]
        self.send_response(code)
        if code == 206:
            last = len(page.data) - 1
            self.send_header("Content-Range", f"bytes {start}-{last}/{len(page.data)}")
        if page.etag:
            self.send_header("ETag", page.etag)
        self.send_header("Content-Type", page.kind)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if page.cuts:
            rest = rest[: page.cuts.pop(0)]
            self.close_connection = True
        self.web.sent[self.path] = self.web.sent.get(self.path, 0) + len(rest)
        self.wfile.write(rest)


@contextmanager
def serve(**pages: Page) -> Generator[Web]:
    """Serve pages by name until the block ends."""
    web = Web(0, {f"/{name}": page for name, page in pages.items()})

    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"web": web}))
    web.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield web
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
