"""Serve a model from a thread, for a client that this process starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager

from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import Assistant
from pipelines.cli.settings import ServeConfig
from pipelines.serving.app import make_app
from pipelines.serving.server import listen, make_server, require_server

__all__ = ["in_background"]

SECONDS = 30  # until it takes connections, and until it has ended


@contextmanager
def in_background(assistant: Assistant, config: ServeConfig) -> Generator[int]:
    """Serve until the block ends; gives the port.

    Raises:
        TrainError: The port is taken, the server is not installed or does not start.
    """
    require_server()
    with listen(config.host, config.port) as taken:
        app = make_app(assistant, config)
        server = make_server(app, config.limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + SECONDS
            while not server.started:
                if time.monotonic() > deadline or not thread.is_alive():
                    raise TrainError(f"serve: the server did not start in {SECONDS} s")
                time.sleep(0.01)
            yield taken.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(SECONDS)
            app.state.worker.close()
