"""A plan's memory by its records, and the topic that measures it."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from lapilli.data.config import SourceConfig
from lapilli.data.mounts import locate
from lapilli.data.planning.parts.read_sources import Reading
from lapilli.data.planning.plan import plan_build
from pipelines.benchmarks.plans.made_up_parts import made_up_folder, made_up_parts, write_stub
from pipelines.benchmarks.plans.plan_scale import make_records
from tests.factories import build_config, make_mixture, make_tokenizer

LEAST, MOST = 1_000, 3_000
ALLOWED = 1_000  # bytes a record with a picture of its own, what is there only for a while included


def test_a_plan_takes_few_bytes_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's objects for names, keys, images and slots took 1,500 that stayed."""
    mixture, tokenizer = make_mixture(tmp_path / "mix"), make_tokenizer(tmp_path / "tokenizer")

    def peak(records: int) -> int:
        write_stub(mixture.root, records)
        source = SourceConfig(name="mix", annotations=f"mix_{records}.json")
        sizes = {"records_per_shard": 8192, "shard_bytes": 1 << 26}
        config = build_config(mixture, tmp_path / "out", tokenizer, sources=[source], **sizes)
        monkeypatch.setattr(locate, "open_folder", partial(made_up_folder, records))
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        plan = plan_build(config, reading=Reading(1, partial(made_up_parts, records)))
        found = tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before
        tracemalloc.stop()
        assert len(plan.slots) == len(plan.entries.kept) == records
        return found

    peak(10)
    slope = (peak(MOST) - peak(LEAST)) / (MOST - LEAST)
    assert slope < ALLOWED, slope


def test_each_size_has_its_pictures(tmp_path: Path) -> None:
    path = make_records(tmp_path, 300)
    text = path.read_text(encoding="utf-8")
    pictures = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.jpg")}
    assert len(pictures) == text.count('"image"') > 250
    assert all(f'"{picture}"' in text for picture in pictures)
    assert make_records(tmp_path, 300) == path
