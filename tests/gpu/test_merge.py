"""The Triton merge on a CUDA device: the interpreter's cases, a graph, and no waiting."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
pytest.importorskip("triton", reason="triton is absent; torch's CUDA build brings it")

from lapilli.model.merging import merge  # noqa: E402
from tests.model.triton_merge import *  # noqa: E402, F403
from tests.model.triton_merge import case  # noqa: E402


def test_never_waits_for_the_device() -> None:
    """In mode `error` torch raises where something waits."""
    ids, index, embedding, features = case(0, 4, 200, 300, 128, dtype=torch.bfloat16)
    merge(ids, index, embedding, features, implementation="triton").sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        merge(ids, index, embedding, features, implementation="triton").sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_in_a_cuda_graph() -> None:
    ids, index, embedding, features = case(0, 4, 200, 300, 128, dtype=torch.bfloat16)
    merge(ids, index, embedding, features, implementation="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        merged = merge(ids, index, embedding, features, implementation="triton")
    ids.copy_(ids.flip(1))
    graph.replay()
    assert torch.equal(merged, merge(ids, index, embedding, features))
