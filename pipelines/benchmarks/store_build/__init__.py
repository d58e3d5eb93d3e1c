"""Builds from a store into a store, at a delay a call and on several nodes."""

from __future__ import annotations

from pipelines.benchmarks.store_build.measured import (
    Inputs,
    StoreBuild,
    main,
    make_inputs,
    store_build,
)

__all__ = ["Inputs", "StoreBuild", "main", "make_inputs", "store_build"]
