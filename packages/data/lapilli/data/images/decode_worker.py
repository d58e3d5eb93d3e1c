"""Decode untrusted images in child processes with bounded time and memory.

Only ending its process stops a decoder written in C. A helper process that has everything loaded
forks one child an image, so starting one takes milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lapilli.data.errors import DataError
from lapilli.data.images.view import BadImage, ImageSpec, prepare
from lapilli.data.record import Reason

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["DecodeLimits", "DecoderProcess", "OverLimit"]

POLL_SECONDS = 0.1  # seconds until an abandoned child is ended
STARTED = b"ready"
MEMORY_WORDS = ("MemoryError", "memory")  # of what Pillow and numpy raise where none is left


@dataclass(frozen=True)
class DecodeLimits:
    """What decoding one image may take.

    Attributes:
        seconds: Of processor time.
        memory_bytes: Of address space, over what the helper has.
    """

    seconds: int
    memory_bytes: int


class OverLimit(Exception):
    """Decoding took more than it may, or its process ended."""


class DecoderProcess:
    """The helper process of one view; usable from several threads.

    Args:
        spec: The view.

    Raises:
        DataError: The process does not start.
    """

    def __init__(self, spec: ImageSpec) -> None:
        self._spec = spec
        self._sending = threading.Lock()
        self._process, self._channel = self._start()

    def prepare(
        self, data: bytes, limits: DecodeLimits, is_over: Callable[[], bool] = lambda: False
    ) -> NDArray[np.uint8]:
        """`images.prepare` in a process of its own.

        Args:
            data: An image file's bytes.
            limits: What it may take.
            is_over: Called ten times a second; True ends the work.

        Returns:
            uint8 [size, size, 3].

        Raises:
            BadImage: As `images.prepare` says.
            OverLimit: It took more, ended otherwise, or is over.
        """
        image = os.memfd_create("image")
        reader, writer = os.pipe()
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, image)
                stack.callback(os.close, writer)
                _write(image, data)
                self._send(json.dumps(asdict(limits)).encode(), [image, writer])
            return self._answer(_read_all(reader, is_over))
        finally:
            os.close(reader)

    def close(self) -> None:
        """End the helper process."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "lapilli.data.images.decode_worker",
                    json.dumps(self._spec.facts()),
                ],
                stdin=there.fileno(),
                stdout=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        if here.recv(len(STARTED)) != STARTED:
            process.wait()
            raise DataError("the process that decodes images did not start; see its error above")
        return process, here

    def _send(self, message: bytes, descriptors: list[int]) -> None:
        with self._sending:
            try:
                socket.send_fds(self._channel, [message], descriptors)
            except OSError:  # it was killed, by the system for want of memory for example
                self.close()
                self._process, self._channel = self._start()
                socket.send_fds(self._channel, [message], descriptors)

    def _answer(self, found: bytes) -> NDArray[np.uint8]:
        size = self._spec.size
        kind, body = found[:1], found[1:]
        if kind == b"P" and len(body) == size * size * 3:
            return np.frombuffer(body, np.uint8).reshape(size, size, 3)
        if kind == b"B":
            with contextlib.suppress(ValueError):  # cut off
                reason, detail = json.loads(body)
                raise BadImage(Reason(reason), detail)
        raise OverLimit


def _read_all(reader: int, is_over: Callable[[], bool]) -> bytes:
    """Read what a child writes after its process id until it exits; end it if `is_over`."""
    found = bytearray()
    process: int | None = None
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], POLL_SECONDS)
            if is_over() and process is not None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                raise OverLimit
            if not ready:
                continue
            piece = os.read(reader, 1 << 16)
            if not piece:
                return bytes(found[4:])
            found += piece
            if process is None and len(found) >= 4:
                with contextlib.suppress(ProcessLookupError):  # it is through already
                    process = os.pidfd_open(int.from_bytes(found[:4], "little"))
    finally:
        if process is not None:
            os.close(process)


# ---- the helper process ------------------------------------------------------------------------


def _serve(channel: socket.socket, spec: ImageSpec) -> None:
    """Fork a child for each message until the pipe is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children leave nothing behind
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which ends this
    channel.sendall(STARTED)
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, 4096, 2)
        if not message:
            return
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                channel.close()
                image, writer = descriptors
                _child(image, writer, DecodeLimits(**json.loads(message)), spec)
            os._exit(0)  # without an answer it was over its limits
        for descriptor in descriptors:
            os.close(descriptor)


def _child(image: int, writer: int, limits: DecodeLimits, spec: ImageSpec) -> None:
    _write(writer, os.getpid().to_bytes(4, "little"))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.seconds, limits.seconds))
    most = _address_space() + limits.memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    try:
        pixels = prepare(os.pread(image, os.fstat(image).st_size, 0), spec)
    except BadImage as bad:
        if not any(word in bad.detail for word in MEMORY_WORDS):
            _write(writer, b"B" + json.dumps([bad.reason.value, bad.detail]).encode())
        return
    _write(writer, b"P" + pixels.tobytes())


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_bytes().split()[0]) * resource.getpagesize()


def _write(descriptor: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]


def _main() -> None:
    spec = ImageSpec.of(json.loads(sys.argv[1]))
    with contextlib.suppress(ImportError):
        import torch

        torch.set_num_threads(1)  # a child of a process with threads would wait for them for ever
    _load(spec)
    with socket.socket(fileno=0) as channel:
        _serve(channel, spec)


def _load(spec: ImageSpec) -> None:
    """Prepare one image, so that the libraries are loaded before the first fork."""
    import io

    from PIL import Image

    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        Image.new("RGB", (40, 30)).save(file, kind)
        prepare(file.getvalue(), spec)


if __name__ == "__main__":
    _main()
