"""The host's copy of a checkpoint's share on a GPU: pinned, of its own size, the same numbers."""

from __future__ import annotations

import pytest
import torch

from lapilli.train.checkpoint.staging import Staging
from lapilli.train.engine.fragments import Fragment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def test_a_share_is_copied_to_pinned_memory_of_its_size() -> None:
    held = torch.randn(3_000_001, device="cuda")

    def fragment(start: int, length: int) -> Fragment:
        return Fragment(
            name="a", kind="weight", start=start, length=length,
            get=lambda: held[start : start + length], set=lambda value: None,
        )  # fmt: skip

    staging = Staging()
    for cuts in ([(0, 1), (1, 3_000_000)], [(5, 1_000_000)]):  # the second has room in the first's
        pieces = staging.copy(fragment(*cut) for cut in cuts)
        expected = held.cpu()
        for piece, (start, length) in zip(pieces, cuts, strict=True):
            assert piece.numbers.is_pinned()
            assert torch.equal(piece.numbers, expected[start : start + length])
        assert pieces[0].numbers.untyped_storage().nbytes() == 4 * 3_000_001
        held.normal_()
    staging.free()
