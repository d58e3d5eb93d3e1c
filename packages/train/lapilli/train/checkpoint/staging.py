"""The host's copy of what is saved: taken between two steps, written while training goes on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapilli.train.engine.fragments import Fragment

__all__ = ["StagedFragment", "Staging"]


@dataclass(frozen=True)
class StagedFragment:
    """A fragment's numbers on the host.

    Attributes:
        key: `NAME/KIND` of the flat tensor that it is of.
        start: The place of its first number there.
        numbers: fp32 [length].
    """

    key: str
    start: int
    numbers: Tensor


class Staging:
    """Memory of the host for one worker's share, kept from save to save.

    Pinned where a GPU copies to it; of exactly the share's size, which torch's pinned tensors are
    not: they take the next power of two.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)
        self._is_pinned = False

    def copy(self, fragments: Iterable[Fragment]) -> list[StagedFragment]:
        """Copy fragments; what was copied before is overwritten."""
        listed = list(fragments)
        self.reserve(sum(fragment.length for fragment in listed))
        pieces, used, devices = list[StagedFragment](), 0, set[torch.device]()
        for fragment in listed:
            numbers = self._buffer[used : used + fragment.length]
            source = fragment.get()
            numbers.copy_(source, non_blocking=self._is_pinned)
            devices.add(source.device)
            pieces.append(
                StagedFragment(f"{fragment.name}/{fragment.kind}", fragment.start, numbers)
            )
            used += fragment.length
        if any(device.type == "cuda" for device in devices):
            torch.cuda.synchronize()
        return pieces

    def reserve(self, numbers: int) -> None:
        """Have room for so many numbers, in pages that are there before the first copy."""
        if numbers <= len(self._buffer):
            return
        self.free()
        self._buffer = torch.empty(numbers).fill_(0.0)
        if torch.cuda.is_available():
            cudart: Any = torch.cuda.cudart()
            place, size = self._buffer.data_ptr(), self._buffer.nbytes
            self._is_pinned = int(cudart.cudaHostRegister(place, size, 0)) == 0

    def free(self) -> None:
        """Give the memory back."""
        if self._is_pinned:
            cudart: Any = torch.cuda.cudart()
            cudart.cudaHostUnregister(self._buffer.data_ptr())
        self._buffer, self._is_pinned = torch.empty(0), False
