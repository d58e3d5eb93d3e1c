"""uvicorn with bounds on connections, header time and protocols."""

from __future__ import annotations

import asyncio
import importlib.util
import socket
from typing import Any

from lapilli.train.errors import TrainError
from pipelines.cli.settings import ServeLimits

__all__ = ["listen", "make_server", "require_server"]

KEEP_ALIVE = 5  # seconds between two requests of a connection


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections.

    Raises:
        TrainError: The address is not this machine's, or the port is taken.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError, UnicodeError) as error:
        raise TrainError(
            f"port: cannot listen on {host}:{port} ({error}); choose another --port or --host"
        ) from None


def require_server() -> None:
    """Stop before a model is opened in vain.

    Raises:
        TrainError: starlette or uvicorn is not installed.
    """
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        raise TrainError("serve and chat need starlette and uvicorn; pip install 'lapilli[chat]'")


def make_server(app: Any, limits: ServeLimits) -> Any:
    """A uvicorn server for an ASGI application."""
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Timed(H11Protocol):
        """HTTP with a time limit for headers, for which uvicorn waits forever."""

        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            """Let time run while no request is being answered."""
            cycle: Any = self.cycle  # None before the first request
            if cycle is not None and not cycle.response_complete:
                self._stop()
            elif self._timer is None and not self.transport.is_closing():
                self._timer = self.loop.call_later(limits.header_seconds, self.transport.abort)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Timed,
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            limit_concurrency=limits.connections,
        )
    )
