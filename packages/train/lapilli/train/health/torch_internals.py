"""What the health of a run needs of torch without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed torch has each of them.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["collective_records", "dump_memory", "record_memory"]


def collective_records() -> list[dict[str, Any]]:
    """This rank's collectives, oldest first, as torch's flight recorder keeps the last 2,000.

    Used: `_dump_nccl_trace_json` of `torch._C._distributed_c10d`, for other backends
    `_dump_fr_trace_json`, and the keys that torch's own analyzer reads. Public is only a file that
    NCCL's watchdog writes after its own time limit. A torch without them has no records here.
    """
    if not dist.is_initialized():
        return []
    name = "_dump_nccl_trace_json" if dist.get_backend() == "nccl" else "_dump_fr_trace_json"
    dump: Any = getattr(importlib.import_module("torch._C._distributed_c10d"), name, None)
    return json.loads(dump()).get("entries", []) if dump else []


def record_memory(*, on: bool) -> None:
    """Have torch's GPU allocator remember who takes what; CUDA alone.

    Used: `torch.cuda.memory._record_memory_history`, which torch's manual names.
    """
    memory: Any = torch.cuda.memory
    memory._record_memory_history(enabled="all" if on else None)


def dump_memory(path: Path) -> None:
    """Write what is remembered, for pytorch.org/memory_viz.

    Used: `torch.cuda.memory._dump_snapshot`, which torch's manual names.
    """
    memory: Any = torch.cuda.memory
    memory._dump_snapshot(str(path))
