"""Talk with a trained model about images on a web page: `serve`, whose page it is.

lapilli chat runs/finetune
"""

from __future__ import annotations

from collections.abc import Sequence

from lapilli.train.checkpoint.at_hand import local_run
from pipelines.cli.command import first_as, parse, run
from pipelines.cli.settings import ServeConfig
from pipelines.serve import serve

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    text = "Talk with a trained model in a browser."
    serve(parse(ServeConfig, first_as("model", argv), text, copied={"model": local_run}))
    return 0


if __name__ == "__main__":
    run(main)
