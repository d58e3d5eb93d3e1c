"""Ray's metrics of builds and runs, and the dashboard that shows them."""

from __future__ import annotations

import json
import re
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lapilli.data import cluster_metrics
from lapilli.data.cluster_metrics import METRICS, add, exported_name, put
from lapilli.data.ray_session import ray_session
from tests.factories import build_config, make_mixture, make_tokenizer

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "pipelines" / "cluster" / "grafana_dashboard.json"
SERVED_WITHIN = 60.0  # seconds; processes tell every 5 or so


def queries() -> dict[str, str]:
    """PromQL by panel."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    return {panel["title"]: one["expr"] for panel in panels for one in panel["targets"]}


@pytest.mark.parametrize("title", queries())
def test_a_query_names_metrics_that_exist(title: str) -> None:
    names = re.findall(r"\bray_\w+", queries()[title])
    assert names
    assert {*names} <= {exported_name(name) for name in METRICS}
    for name in names:  # a counter says nothing by itself but its sum, a gauge has no rate
        is_rate = f"rate({name}[" in queries()[title]
        assert not is_rate or name.endswith("_total"), name


def test_every_metric_is_shown() -> None:
    shown = {name for query in queries().values() for name in re.findall(r"\bray_\w+", query)}
    assert {exported_name(name) for name in METRICS} == shown


def test_every_metric_is_told_by_some_code() -> None:
    packages = [*(ROOT / "packages").rglob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    text = "".join(path.read_text() for path in packages if path.name != "cluster_metrics.py")
    step = re.findall(r'^            \("(\w+)", row\.', text, re.MULTILINE)
    told = {*re.findall(r'"(lapilli_\w+)"', text), *(f"lapilli_train_{name}" for name in step)}
    assert {*METRICS} <= told
    assert {name for name in told if re.match("lapilli_(build|train|cache)_", name)} <= {*METRICS}


def test_nothing_is_done_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even an import: a run of one process has no Ray."""

    def fails(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(cluster_metrics, "_metric", fails)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    add("lapilli_cache_hits", 1, "a")
    put("lapilli_train_loss", 1.0, "a")
    assert "ray" not in sys.modules


@pytest.mark.faults  # a minute on a busy machine
def test_the_nodes_endpoint_serves_them(tmp_path: Path) -> None:
    """Of a real build; what training tells is told by its own code with a step's row."""
    from lapilli.train.metrics.step_log import StepLog
    from pipelines.preprocess import preprocess
    from tests.train.small_run import made_step

    config = build_config(
        make_mixture(tmp_path / "raw", images=8), tmp_path / "shown", make_tokenizer(tmp_path / "t")
    )
    with ray_session():
        import ray

        preprocess(config)
        log = StepLog.__new__(StepLog)
        log._run = "s3://bucket/runs/one"  # pyright: ignore[reportPrivateUsage]
        log._export(made_step(3, mfu=0.4, tokens=640, tokens_per_second=1280.0))  # pyright: ignore[reportPrivateUsage]
        (node,) = ray.nodes()
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        wanted = {
            exported_name(name)
            for name in METRICS
            if name.startswith(("lapilli_build", "lapilli_train"))
        } - {"ray_lapilli_train_checkpoint_seconds", "ray_lapilli_build_quarantined_total"}
        served = ""  # of all answers: a gauge is served once for each time it is set
        deadline = time.monotonic() + SERVED_WITHIN
        while time.monotonic() < deadline and not all(name in served for name in wanted):
            time.sleep(0.5)
            with urllib.request.urlopen(address, timeout=10) as answer:
                served += answer.read().decode()
    assert {name for name in wanted if name not in served} == set()
    images = re.findall(r'ray_lapilli_build_images_total\{.*of="shown".*\} (\S+)', served)
    assert float(images[-1]) == 16  # of 8 images two views each
    losses = re.findall(r'ray_lapilli_train_loss\{.*of="one".*\} (\S+)', served)
    assert {*map(float, losses)} == {1.0}
