"""Serve a model with OpenAI's chat completions and a chat page, on loopback by default.

lapilli serve runs/finetune --port 8080
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from lapilli.train.checkpoint.at_hand import local_run
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.inference.assistant import open_assistant
from pipelines.cli.command import first_as, parse, run, say
from pipelines.cli.settings import ServeConfig
from pipelines.serving.app import make_app
from pipelines.serving.server import listen, make_server, require_server

__all__ = ["main", "serve"]


def serve(config: ServeConfig) -> None:
    """Serve until Ctrl-C."""
    require_server()
    device = torch_device(choose_device(config.device, visible_devices()))
    assistant = open_assistant(
        Path(config.model), device, config.trust, template=config.template, view=config.view
    )
    with listen(config.host, config.port) as taken:
        app = make_app(assistant, config)
        server = make_server(app, config.limits)
        port = taken.getsockname()[1]
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{host}:{port}"
        say(f"{config.model} on {device}: {address}/ (Ctrl-C ends it)")
        say(f"OpenAI's API: {address}/v1, model {config.name or assistant.name}")
        try:
            with suppress(KeyboardInterrupt):
                server.run(sockets=[taken])
        finally:
            app.state.worker.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    text = "OpenAI's chat completions and a chat page for a trained model."
    serve(parse(ServeConfig, first_as("model", argv), text, copied={"model": local_run}))
    return 0


if __name__ == "__main__":
    run(main)
