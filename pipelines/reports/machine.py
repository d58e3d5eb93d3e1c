"""Describe the machine and the libraries that a result was made with."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

from lapilli.data.versions import installed_versions

__all__ = ["describe_hardware", "processor", "versions"]


def versions() -> dict[str, str]:
    """The libraries that decide the result."""
    names = ("lapilli", "torch", "ray", "deepspeed", "transformers", "pyarrow", "pillow")
    return {
        "python": platform.python_version(),
        **installed_versions(*names),
    }


def describe_hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1),
        "gpus": gpus,
    }


def processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.machine()
