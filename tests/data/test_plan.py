"""A plan: every record with its verdict, every image a slot, and what decides bytes by name."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.planning import plan
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import ImageTask
from lapilli.data.record import Reason
from tests.factories import (
    CLIP_MEAN,
    Mixture,
    build_config,
    conversation,
    image_bytes,
    make_mixture,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def mixture(tmp_path: Path) -> Mixture:
    return make_mixture(tmp_path / "root", defects=True)


@pytest.fixture
def config(mixture: Mixture, tmp_path: Path, tokenizer: Path) -> BuildConfig:
    return build_config(mixture, tmp_path / "out", tokenizer)


def test_every_element_has_an_entry_in_order(mixture: Mixture, config: BuildConfig) -> None:
    entries = plan_build(config).entries
    assert [entry.sample_id for entry in entries] == list(mixture.expected)
    decoding = {Reason.IMAGE_UNDECODABLE, Reason.IMAGE_TOO_LARGE}
    early = {k: None if v in decoding else v for k, v in mixture.expected.items()}
    assert {entry.sample_id: entry.verdict.reason for entry in entries} == early


def test_each_image_has_one_slot_in_the_order_of_first_use(config: BuildConfig) -> None:
    plan = plan_build(config)
    used = [
        image_id
        for images in map(plan.entries.images, plan.entries.kept.tolist())
        for image_id in images
    ]
    assert plan.image_ids == list(dict.fromkeys(used))
    assert [name for name, _ in plan.slots] == plan.image_ids
    assert plan.slots.of_images().tolist() == [*range(len(plan.image_ids))]
    for image_id in plan.image_ids:
        assert (Path(config.root) / image_id).is_file()


def test_tasks_cover_every_slot_and_record_once(config: BuildConfig) -> None:
    plan = plan_build(config)
    for view, spec in config.views.items():
        tasks = [task for task in plan.image_tasks() if task.name.startswith(f"images/{view}/")]
        assert [i for task in tasks for i in task.image_ids] == plan.image_ids
        largest = max(len(task.image_ids) for task in tasks)
        assert largest * spec.size**2 * 3 <= config.shard_bytes
        assert largest == plan.views[view].images_per_shard
    records = [record.sample_id for task in plan.token_tasks() for record in task.records()]
    assert records == [entry.sample_id for entry in plan.entries if entry.verdict.kept]
    assert all(len(task.packed) <= config.records_per_shard for task in plan.token_tasks())
    names = [task.name for task in (*plan.token_tasks(), *plan.image_tasks())]
    assert len(set(names)) == len(names)


def test_two_sources_share_an_image(tmp_path: Path, tokenizer: Path) -> None:
    images = tmp_path / "root" / "images"
    images.mkdir(parents=True)
    (images / "a.png").write_bytes(image_bytes("png"))
    for name, key in (("one", "a.png"), ("two", "images/a.png")):
        record = conversation("same", key)
        (tmp_path / "root" / f"{name}.json").write_text(json.dumps([record]))
    sources = [SourceConfig("one", "one.json", "images"), SourceConfig("two", "two.json")]
    mixture = Mixture(tmp_path / "root", sources, {}, [])
    plan = plan_build(build_config(mixture, tmp_path / "out", tokenizer))
    assert plan.image_ids == ["images/a.png"]
    assert [entry.sample_id for entry in plan.entries] == ["one/same", "two/same"]


def test_workers_need_not_stand_where_the_driver_stands(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, tokenizer = Path(config.root), Path(config.tokenizer)
    monkeypatch.chdir(root.parent)
    relative = replace(config, root=root.name, tokenizer=os.path.relpath(tokenizer))
    plan = plan_build(relative)
    assert plan.config.root == str(root)
    assert plan.token_tasks()[0].tokenizer == str(tokenizer)
    assert plan.digests == plan_build(config).digests


# ---- what changed is named ---------------------------------------------------------------------


def changed(config: BuildConfig, other: BuildConfig) -> set[str]:
    before, now = plan_build(config).digests, plan_build(other).digests
    return {name for name in before.keys() | now if before.get(name) != now.get(name)}


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"num_workers": 7, "max_quarantined": 0.9, "output": "/elsewhere"}, set[str]()),
        ({"template": "plain"}, {"template"}),
        ({"records_per_shard": 9}, {"records_per_shard"}),
        ({"shard_bytes": 99_999}, {"shard_bytes"}),
        ({"max_text_length": 99}, {"max_text_length"}),
        # the verdicts on its records change with it
        ({"compat": "llava"}, {"compat", "codecs", "source made_up"}),
        ({"views": {"v": ImageSpec(8, CLIP_MEAN)}}, {"views", "codecs"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_a_changed_setting_has_its_name(
    config: BuildConfig, change: dict[str, Any], names: set[str]
) -> None:
    assert changed(config, replace(config, **change)) == names


def test_another_tokenizer_has_its_name(config: BuildConfig, tmp_path: Path) -> None:
    other = make_tokenizer(tmp_path / "other", vocab_size=300)
    assert changed(config, replace(config, tokenizer=str(other))) == {"tokenizer"}


def test_a_changed_input_has_its_name(config: BuildConfig, mixture: Mixture) -> None:
    before = plan_build(config).digests
    assert plan_build(config).digests == before
    image = Path(config.root) / plan_build(config).image_ids[0]
    os.utime(image, ns=(1, 1))
    touched = plan_build(config).digests
    assert {name for name in before if before[name] != touched[name]} == {"images"}
    annotations = mixture.root / "mixture.json"
    annotations.write_text(annotations.read_text().replace("What colour", "Which colour", 1))
    edited = plan_build(config).digests
    assert {name for name in before if touched[name] != edited[name]} == {"source made_up"}


def test_the_root_may_be_elsewhere(config: BuildConfig, tmp_path: Path) -> None:
    before = plan_build(config).digests
    moved = Path(config.root).rename(tmp_path / "moved")
    assert plan_build(replace(config, root=str(moved))).digests == before


# ---- mistakes ----------------------------------------------------------------------------------


def test_a_worker_gets_all_it_needs_in_the_task(config: BuildConfig) -> None:
    for task in plan_build(config).image_tasks():
        assert isinstance(task, ImageTask)
        assert Path(task.root).is_absolute()
        assert task.codecs.resizer != "auto"
        assert "pyarrow" in task.writer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "holds no record, expected at least one"),
        ("", "is empty"),
        ("<html>", "web page"),
        ('[{"id": 1}', "no valid JSON after 1 records"),
        ('[{"id": 1}, {"id": 2}]', r"2 of 2 records quarantined, nothing is kept: schema 2; first"),
    ],
)
def test_a_wrong_annotation_file_stops_the_plan(
    config: BuildConfig, mixture: Mixture, content: str, message: str
) -> None:
    (mixture.root / "mixture.json").write_text(content)
    with pytest.raises(DataError, match=message):
        plan_build(config)
    assert not Path(config.output).exists()


def test_more_names_than_a_dataset_holds_are_one_line(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = plan_build(config)
    ids = [*found.entries.sample_ids.to_pylist(), *found.image_ids]
    most = sum(len(name.encode()) for name in ids)
    monkeypatch.setattr(plan, "MOST_NAMES", most)
    plan_build(config)
    monkeypatch.setattr(plan, "MOST_NAMES", most - 1)
    with pytest.raises(DataError, match=f"take {most:,} bytes; expected at most"):
        plan_build(config)


def test_too_much_quarantine_names_counts_and_the_first(config: BuildConfig) -> None:
    bad = sum(not entry.verdict.kept for entry in plan_build(config).entries)
    total = len(plan_build(config).entries)
    plan_build(replace(config, max_quarantined=bad / total))
    with pytest.raises(DataError) as caught:
        plan_build(replace(config, max_quarantined=(bad - 1) / total))
    message = str(caught.value)
    assert message.startswith(f"{bad} of {total} records quarantined, over max_quarantined 0.")
    assert "schema 7, " in message
    assert "first made_up/@16: expected an object, found str" in message
    assert message.endswith("raise --max_quarantined")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"root": "/nowhere"}, r"root: folder /nowhere does not exist; pass --root"),
        ({"tokenizer": "/nowhere/at/all"}, "tokenizer folder /nowhere/at/all does not exist"),
        ({"template": "v7"}, "template 'v7' is unknown: take one of"),
        ({"sources": [SourceConfig("s", "none.json")]}, r"none.json: No such file"),
        ({"sources": [SourceConfig("s", "mixture.json", "pics")]}, r"pics does not exist"),
        ({"sources": [SourceConfig("s", "mixture.json", format="lava")]}, "format: 'lava'"),
    ],
    ids=str,
)
def test_a_missing_thing_is_named(
    config: BuildConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        plan_build(replace(config, **change))


SOURCE = SourceConfig("s", "a.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": []}, "sources: empty"),
        ({"sources": [SOURCE, SOURCE]}, "name 's' is used twice"),
        ({"views": {}}, "views: empty"),
        ({"views": {"../up": ImageSpec(8, CLIP_MEAN)}}, r"views: '../up'; expected letters"),
        ({"max_quarantined": 1.5}, "max_quarantined: 1.5; expected a share from 0 to 1"),
        ({"records_per_shard": 0}, "records_per_shard: 0; expected at least 1"),
        ({"shard_bytes": -1}, "shard_bytes: -1; expected at least 1"),
        ({"num_workers": -1}, r"num_workers: -1; expected 0 \(every core\) or more"),
    ],
)
def test_a_wrong_setting_is_named(
    config: BuildConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        replace(config, **change)
