"""Which resizer a setting stands for, and that a worker with another one stops."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import PIL
import pytest

from lapilli.data.errors import DataError
from lapilli.data.images import node_codecs
from lapilli.data.images.codecs import (
    available_codecs,
    note_simd,
    replaced_simd,
    resolve_codecs,
    resolve_resizer,
)


@pytest.fixture
def simd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", "12.1.1.post0")


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIL, "__version__", "13.0.0")


@pytest.mark.usefixtures("stock")
def test_with_stock_pillow_auto_is_torch() -> None:
    assert resolve_resizer("auto") == "torch"
    assert resolve_resizer("pillow") == "pillow"
    with pytest.raises(DataError, match=r"Pillow 13\.0\.0 is loaded; install pillow-simd"):
        resolve_resizer("simd")


@pytest.mark.usefixtures("simd")
def test_with_pillow_simd_auto_is_torch_where_torch_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_resizer("auto") == "torch"
    assert resolve_resizer("simd") == "simd"
    with pytest.raises(DataError, match=r"pillow-simd 12\.1\.1\.post0 is loaded; reinstall pillow"):
        resolve_resizer("pillow")
    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    assert resolve_resizer("auto") == "simd"


def find_nothing(name: str) -> None:
    """No package is installed."""
    del name


@pytest.mark.usefixtures("stock")
def test_without_torch_the_torch_resizer_is_refused_and_auto_is_pillow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", find_nothing)
    with pytest.raises(DataError, match=r"torch is not installed here; run pip install"):
        resolve_resizer("torch")
    assert resolve_resizer("auto") == "pillow"


@pytest.mark.usefixtures("stock")
def test_codecs_name_versions_without_the_local_part() -> None:
    codecs = resolve_codecs("torch")
    jpeg = importlib.metadata.version("simplejpeg")
    assert codecs.decoder == f"simplejpeg {jpeg} and pillow 13.0.0"
    assert codecs.resizer_version == importlib.metadata.version("torch").split("+")[0]
    assert resolve_codecs("pillow").resizer_version == "13.0.0"


@pytest.mark.parametrize(
    "change", [{"decoder": "pillow 9.5.0"}, {"resizer_version": "1.0.0"}], ids=str
)
def test_a_worker_with_other_versions_stops(change: dict[str, str]) -> None:
    codecs = resolve_codecs("torch")
    codecs.require()
    with pytest.raises(DataError, match=r"this worker has .*; install the same versions") as caught:
        replace(codecs, **change).require()
    assert next(iter(change.values())) in str(caught.value)


def test_a_replaced_pillow_simd_is_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert replaced_simd() == ""  # it was never built here
    monkeypatch.setattr(PIL, "__version__", "12.1.1.post0")
    note_simd()
    assert replaced_simd() == ""
    monkeypatch.setattr(PIL, "__version__", "13.0.0")
    assert "pillow-simd 12.1.1.post0 was built here, Pillow 13.0.0 is loaded" in replaced_simd()
    assert replaced_simd().endswith("run make simd again")


@pytest.mark.usefixtures("ray_local")
def test_the_nodes_of_a_cluster_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """`RAY_ADDRESS` is set in a job; here the cluster is the test's own Ray of one node."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    (found,) = node_codecs.ask_nodes().values()
    assert found == available_codecs()
    assert node_codecs.resolve_for_nodes("auto") == available_codecs()[0]
    assert node_codecs.resolve_for_nodes("torch").resizer == "torch"
