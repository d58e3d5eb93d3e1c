"""Peak matrix-multiplication rates of devices, for utilisation."""

from __future__ import annotations

import re
import time

import torch

__all__ = ["PEAKS", "measured_peak", "peak_flops"]

# Operations a second in bf16 with fp32 sums, dense. What a data sheet gives "with sparsity" is
# halved. Names as torch reports them, the special before the general.
PEAKS: tuple[tuple[str, float], ...] = (
    (r"GB[23]00", 2500e12),
    (r"B[23]00", 2250e12),
    (r"B100", 1750e12),
    (r"H[12]00 NVL", 835e12),
    (r"H100 PCIe", 756e12),
    (r"GH200|H[12]00", 989.4e12),
    (r"H800", 989.4e12),
    (r"H20\b", 148e12),
    (r"A[18]00\b", 312e12),
    (r"A40\b", 149.7e12),
    (r"A10G", 70e12),
    (r"A10\b", 125e12),
    (r"L40S", 362e12),
    (r"L40\b", 181e12),
    (r"L4\b", 121e12),
    (r"RTX 6000 Ada", 364.2e12),
    (r"RTX A6000", 154.8e12),
    (r"RTX 5090", 209.5e12),
    (r"RTX 4090", 165.2e12),
    (r"RTX 3090 Ti", 80e12),
    (r"RTX 3090", 71e12),
    (r"GAUDI ?3", 1835e12),
    (r"GAUDI ?2", 432e12),
)


def peak_flops(device_name: str) -> float | None:
    """A device's peak rate in bf16, or None for one that is not listed: then there is no MFU.

    From the makers' data sheets and white papers: NVIDIA A100, H100, H200, Blackwell, L40S, A10,
    the Ampere GA102, Ada and Blackwell GeForce architectures (tensor cores, bf16 with fp32
    accumulation); Intel Gaudi 2 and Gaudi 3 (matrix engine). They hold at the maker's clock and
    power limit; a card that is held below cannot reach them.

    Args:
        device_name: As `torch.cuda.get_device_name` or Habana's torch says it.

    Returns:
        Operations a second; a multiplication and an addition are two.
    """
    return next((peak for name, peak in PEAKS if re.search(name, device_name, re.IGNORECASE)), None)


def measured_peak(
    device: torch.device, dtype: torch.dtype = torch.float32, *, size: int = 1024, rounds: int = 5
) -> float:
    """The best rate of a square matrix product, for a device without a data sheet: a CPU.

    Takes some hundredths of a second with the threads that torch has.

    Returns:
        Operations a second.
    """
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        begin = time.perf_counter()
        torch.mm(left, right)[0, 0].item()  # waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best
