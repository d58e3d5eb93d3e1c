"""--incremental makes only what changed again, and the dataset is what a fresh build would give."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lapilli.data.building import driver, finish
from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.images.encodings import Encoding
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import Task
from lapilli.data.shards.manifest import read_manifest
from tests.factories import (
    CLIP_MEAN,
    build_config,
    conversation,
    image_bytes,
    make_mixture,
    make_tokenizer,
)

Change = Callable[[BuildConfig], BuildConfig]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> BuildConfig:
    """A dataset with every defect; tests amend a copy."""
    folder = tmp_path_factory.mktemp("amend")
    mixture = make_mixture(folder / "root", images=20, defects=True)
    config = build_config(mixture, folder / "out", make_tokenizer(folder / "tokenizer"))
    build(plan_build(config), runner=run_here)
    return config


@pytest.fixture
def config(built: BuildConfig, tmp_path: Path) -> BuildConfig:
    """Settings of a copy of the dataset and of what it was made of."""
    root, output = tmp_path / "root", tmp_path / "out"
    shutil.copytree(built.root, root, symlinks=True)
    shutil.copytree(built.output, output)
    outside = Path(built.root).with_name("root_outside.png")
    shutil.copy2(outside, tmp_path / outside.name)
    return replace(built, root=str(root), output=str(output))


def amend(config: BuildConfig, **changes: Any) -> BuildReport:
    return build(plan_build(replace(config, incremental=True, **changes)), runner=run_here)


def content(output: Path) -> dict[str, Any]:
    """All that a training could see of a dataset, in its order, without names of shards."""
    manifest = read_manifest(output)
    views = {
        view: open_dataset(output, view=view, image_tokens=4)
        for view, facts in manifest.views.items()
        if facts.encoding["kind"] != "original"
    }
    seen: dict[str, Any] = {}
    for view, dataset in views.items():
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            row = dataset.token_row(index)
            seen[f"{view} {index}"] = (
                sample.sample_id,
                sample.pixels.tobytes(),
                sample.input_ids.tolist(),
                sample.label_spans.tolist(),
                row["image_ids"],
                row["llava_length"],
            )
    return seen | {"counts": {**manifest.counts, "unused_images": 0}, "mixture": manifest.mixture}


def files(output: Path) -> dict[str, str]:
    paths = [path for path in output.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def shards(output: Path) -> dict[str, str]:
    return {
        name: digest
        for name, digest in files(output).items()
        if name.startswith(("tokens/", "images/")) and name.endswith(".arrow")
    }


def assert_as_fresh(config: BuildConfig) -> None:
    """The amended dataset holds what a fresh build gives, and every file has a use."""
    output = Path(config.output)
    fresh = replace(config, output=str(output.with_name("fresh")), incremental=False)
    shutil.rmtree(fresh.output, ignore_errors=True)
    build(plan_build(fresh), runner=run_here)
    assert content(output) == content(Path(fresh.output))
    manifest = read_manifest(output)
    named = {s.path for s in manifest.tokens}
    named |= {s.path for view in manifest.views.values() for s in view.shards}
    assert set(shards(output)) == named
    again = build(plan_build(replace(config, incremental=False)), runner=run_here)
    assert again.shards_built == 0
    assert again.manifest == manifest


# ---- what may change ---------------------------------------------------------------------------


def missing_appears(config: BuildConfig) -> BuildConfig:
    path = Path(config.root) / "images" / "bad" / "nowhere.jpg"
    path.write_bytes(image_bytes("jpeg", seed=99))
    return config


def corrupt_replaced(config: BuildConfig) -> BuildConfig:
    path = Path(config.root) / "images" / "bad" / "truncated_png.jpg"
    path.write_bytes(image_bytes("png", 64, 48))
    return config


def image_replaced(config: BuildConfig) -> BuildConfig:
    path = sorted((Path(config.root) / "images" / "0").iterdir())[0]
    path.write_bytes(image_bytes("jpeg", 33, 44, seed=5))
    return config


def source_appended(config: BuildConfig) -> BuildConfig:
    root = Path(config.root)
    (root / "images" / "new.png").write_bytes(image_bytes("png", seed=7))
    old = sorted((root / "images" / "1").iterdir())[0].relative_to(root / "images")
    records = [conversation("n0", "new.png"), conversation("n1"), conversation("n2", str(old))]
    (root / "more.json").write_text(json.dumps(records))
    return replace(config, sources=[*config.sources, SourceConfig("more", "more.json", "images")])


def source_in_front(config: BuildConfig) -> BuildConfig:
    changed = source_appended(config)
    return replace(changed, sources=changed.sources[::-1])


def record_deleted(config: BuildConfig) -> BuildConfig:
    path = Path(config.root) / "mixture.json"
    records = json.loads(path.read_text())
    place = next(i for i, r in enumerate(records) if r["id"] == "image-4")
    path.write_text(json.dumps(records[:place] + records[place + 1 :]))
    return config


def record_edited(config: BuildConfig) -> BuildConfig:
    path = Path(config.root) / "mixture.json"
    path.write_text(path.read_text().replace("What colour", "Which colour", 1))
    return config


def records_excluded(config: BuildConfig) -> BuildConfig:
    return replace(config, exclude=["made_up/image-3", "made_up/text-1"])


def everything(config: BuildConfig) -> BuildConfig:
    for change in (missing_appears, corrupt_replaced, image_replaced, record_edited):
        config = change(config)
    return source_in_front(records_excluded(config))


def view_added(config: BuildConfig) -> BuildConfig:
    return replace(config, views={**config.views, "new": ImageSpec(12, CLIP_MEAN)})


def view_removed(config: BuildConfig) -> BuildConfig:
    return replace(config, views={"crop24": config.views["crop24"]})


def template_changed(config: BuildConfig) -> BuildConfig:
    return replace(config, template="plain")


# A change, the shards that it builds of the small dataset (records, pad32, crop24), what is named.
CHANGES: list[tuple[Change, tuple[int, int, int], str]] = [
    (missing_appears, (1, 1, 1), "source made_up; another images"),
    (corrupt_replaced, (0, 1, 1), "images"),
    (image_replaced, (0, 1, 1), "images"),
    (source_appended, (1, 1, 1), "images; another source more"),
    (source_in_front, (1, 1, 1), "images; another source more"),
    (record_deleted, (0, 0, 0), "images; another source made_up"),
    (record_edited, (1, 0, 0), "source made_up"),
    (records_excluded, (0, 0, 0), "images; another source made_up"),
    (view_removed, (0, 0, 0), "views"),
    (template_changed, (6, 0, 0), "template"),
]


def number_built(before: dict[str, str], after: dict[str, str], folder: str) -> int:
    return len({n for n in after if n.startswith(folder)} - set(before))


@pytest.mark.parametrize(
    ("change", "expected", "named"), CHANGES, ids=[change.__name__ for change, *_ in CHANGES]
)
def test_only_what_changed_is_made_again(
    config: BuildConfig, change: Change, expected: tuple[int, int, int], named: str
) -> None:
    before = shards(Path(config.output))
    changed = change(config)
    with pytest.raises(DataError, match=r"was built with another .*pass --incremental") as caught:
        build(plan_build(changed), runner=run_here)
    assert all(name in str(caught.value) for name in named.split("; another "))
    assert shards(Path(config.output)) == before
    report = amend(changed)
    after = shards(Path(config.output))
    assert all(after[name] == digest for name, digest in before.items() if name in after)
    folders = ("tokens/", "images/pad32/", "images/crop24/")
    assert tuple(number_built(before, after, folder) for folder in folders) == expected
    assert report.shards_built == sum(expected)
    assert report.shards_reused == len(after) - sum(expected)
    assert_as_fresh(changed)


@pytest.mark.parametrize("change", [everything, view_added])
def test_many_changes_at_once_and_back_again(config: BuildConfig, change: Change) -> None:
    before, wanted = shards(Path(config.output)), content(Path(config.output))
    changed = change(config)
    report = amend(changed)
    assert report.shards_reused > 0
    assert_as_fresh(changed)
    if change is view_added:
        assert set(before) < set(shards(Path(config.output)))
        amend(config)
        assert content(Path(config.output)) == wanted
        assert shards(Path(config.output)) == before


def test_an_amended_dataset_is_amended_again(config: BuildConfig) -> None:
    for change in (records_excluded, missing_appears, source_appended, corrupt_replaced):
        config = change(config)
        amend(config)
    assert_as_fresh(config)
    config = replace(config, exclude=[])  # the records come back
    amend(config)
    assert_as_fresh(config)


def test_the_fixed_names_are_those_of_the_manifest(config: BuildConfig) -> None:
    output = Path(config.output)
    amend(missing_appears(config))
    manifest = read_manifest(output)
    assert manifest.selection.path != "selection.arrow"
    assert manifest.quarantine is not None
    for facts, name in ((manifest.selection, ".arrow"), (manifest.quarantine, ".parquet")):
        fixed = facts.path.partition("-")[0] + name
        assert (output / fixed).read_bytes() == (output / facts.path).read_bytes()


# ---- stopped half-way --------------------------------------------------------------------------


class Stop(Exception):
    """Stands for the end of the process."""


def test_an_amend_that_stops_leaves_the_old_dataset(config: BuildConfig) -> None:
    output = Path(config.output)
    wanted = content(output)
    changed = everything(config)

    def stopped(tasks: list[Task], output: Output, workers: int) -> Any:
        yield from run_here(tasks[:2], output, workers)
        raise Stop

    with pytest.raises(Stop):
        build(plan_build(replace(changed, incremental=True)), runner=stopped)
    assert content(output) == wanted
    again = amend(changed)
    assert again.shards_reused > 2
    assert_as_fresh(changed)


@pytest.mark.parametrize("step", ["write_manifest", "tidy"])
def test_an_amend_that_stops_at_the_manifest(
    config: BuildConfig, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    output = Path(config.output)
    wanted = content(output)
    changed = everything(config)
    with monkeypatch.context() as patch:

        def stop(*_: Any) -> None:
            raise Stop

        patch.setattr(finish if step == "write_manifest" else driver, step, stop)
        with pytest.raises(Stop):
            amend(changed)
    assert (content(output) == wanted) == (step == "write_manifest")
    amend(changed)
    assert_as_fresh(changed)


def test_an_amend_that_is_given_up_leaves_nothing(config: BuildConfig) -> None:
    before = files(Path(config.output))
    before.pop("plan.json")
    amended = replace(record_edited(config), incremental=True, template="plain")
    Path(config.root, "mixture.json").write_text(
        Path(config.root, "mixture.json").read_text().replace("Which colour", "What colour", 1)
    )

    def stopped(tasks: list[Task], output: Output, workers: int) -> Any:
        yield from run_here(tasks[:2], output, workers)
        raise Stop

    with pytest.raises(Stop):
        build(plan_build(amended), runner=stopped)
    build(plan_build(config), runner=run_here)
    after = files(Path(config.output))
    after.pop("plan.json")
    assert set(after) == set(before)
    assert {n: d for n, d in after.items() if n.endswith(".arrow")} == {
        n: d for n, d in before.items() if n.endswith(".arrow")
    }


def test_an_unfinished_build_is_amended_too(config: BuildConfig, tmp_path: Path) -> None:
    config = replace(config, output=str(tmp_path / "unfinished"))

    def stopped(tasks: list[Task], output: Output, workers: int) -> Any:
        yield from run_here(tasks[:-1], output, workers)
        raise Stop

    with pytest.raises(Stop):
        build(plan_build(config), runner=stopped)
    changed = corrupt_replaced(config)
    assert amend(changed).shards_built == 3  # one that was left, and one of each view
    assert_as_fresh(changed)


def test_a_damaged_shard_with_rows_of_no_use_is_made_anew(config: BuildConfig) -> None:
    changed = records_excluded(config)
    amend(changed)
    victim = sorted(Path(config.output).glob("tokens/*/00000-*.arrow"))[0]
    victim.write_bytes(victim.read_bytes()[:-1])
    for path in Path(config.output).glob("images/*/0000[01]-*.arrow"):
        path.unlink()
    build(plan_build(changed), runner=run_here)
    assert_as_fresh(changed)


# ---- excluded, encodings, originals ------------------------------------------------------------


def test_an_excluded_record_that_does_not_exist_is_named(config: BuildConfig) -> None:
    with pytest.raises(DataError, match=r"exclude: 'made_up/none' is no record's sample id"):
        plan_build(replace(config, exclude=["made_up/none"]))


def test_excluded_records_do_not_count_as_defects(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=2, text_only=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = build_config(mixture, tmp_path / "out", tokenizer, max_quarantined=0.0)
    config = replace(config, exclude=["made_up/text-0", "made_up/image-1"])
    counts = build(plan_build(config), runner=run_here).manifest.counts
    assert (counts["read"], counts["kept"], counts["reasons"]) == (4, 2, {"excluded": 2})


def test_a_view_is_made_from_the_originals_without_the_images(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=20, defects=True)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = build_config(mixture, tmp_path / "out", tokenizer, keep_original=True)
    build(plan_build(config), runner=run_here)
    before = shards(tmp_path / "out")
    for shard in (tmp_path / "out" / "images" / "original").glob("*.arrow"):
        for row in pa.ipc.open_file(str(shard)).read_all().to_pylist():
            assert row["pixels"] == (mixture.root / row["image_id"]).read_bytes()
            assert (row["status"] == "ok") == (row["source_width"] is not None)
    added = view_added(config)
    fresh = replace(added, output=str(tmp_path / "fresh"))
    build(plan_build(fresh), runner=run_here)
    shutil.rmtree(mixture.root / "images")
    report = amend(added)
    assert report.shards_built == len(read_manifest(tmp_path / "out").views["new"].shards)
    now, then = content(tmp_path / "out"), content(tmp_path / "fresh")
    for found in (now, then):
        found["counts"] = {k: v for k, v in found["counts"].items() if k not in ("repairs",)}
    now["counts"]["reasons"], then["counts"]["reasons"] = {}, {}  # nothing leads out of nowhere
    assert now == then
    assert before.items() <= shards(tmp_path / "out").items()


def test_no_tower_opens_the_originals(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    config = build_config(mixture, tmp_path / "out", tokenizer, keep_original=True)
    build(plan_build(config), runner=run_here)
    with pytest.raises(DataError, match=r"'original' of .* holds the images' files and no pixels"):
        open_dataset(tmp_path / "out", view="original", image_tokens=1)


def test_a_view_as_jpeg_takes_less_and_says_how_far_off_it_is(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=20, defects=True)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    encodings = {"crop24": Encoding("jpeg", 90)}
    config = build_config(mixture, tmp_path / "out", tokenizer)
    build(plan_build(config), runner=run_here)
    raw = content(tmp_path / "out")
    before = shards(tmp_path / "out")
    amended = replace(config, encodings=encodings)
    manifest = amend(amended).manifest
    after = shards(tmp_path / "out")
    assert {n for n in after if "crop24" not in n} == {n for n in before if "crop24" not in n}
    facts = manifest.views["crop24"].encoding
    assert (facts["kind"], facts["quality"]) == ("jpeg", 90)
    compare_with_raw(config, tmp_path, facts["error"])
    assert {k: v for k, v in content(tmp_path / "out").items() if k.startswith("pad32")} == {
        k: v for k, v in raw.items() if k.startswith("pad32")
    }


def compare_with_raw(config: BuildConfig, tmp_path: Path, error: dict[str, float]) -> None:
    """The error in the manifest is that of what is read, by plain numpy."""
    import numpy as np

    fresh = replace(config, output=str(tmp_path / "raw"))
    build(plan_build(fresh), runner=run_here)
    pixels: dict[str, Any] = {}
    for name in ("raw", "out"):
        dataset = open_dataset(tmp_path / name, view="crop24", image_tokens=1)
        for index in range(len(dataset)):
            row, sample = dataset.token_row(index), dataset.sample(index)
            for image_id, image in zip(row["image_ids"], sample.pixels, strict=True):
                pixels[f"{name}/{image_id}"] = image.astype(float)
    ids = [name.removeprefix("raw/") for name in pixels if name.startswith("raw/")]
    difference = np.stack([pixels[f"raw/{i}"] - pixels[f"out/{i}"] for i in ids])
    assert error["mean"] == pytest.approx(np.abs(difference).mean(), rel=0.02)
    psnr = 10 * np.log10(255**2 / (difference**2).mean())
    assert error["psnr"] == pytest.approx(psnr, rel=0.02)
    assert error["worst"] == np.abs(difference).max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encodings": {"none": Encoding()}}, "encodings: 'none' is no view; expected of pad32"),
        ({"encodings": {"pad32": Encoding("original")}}, "set keep_original for source bytes"),
        ({"views": {"original": ImageSpec(8, CLIP_MEAN)}}, "is the name of the source bytes"),
    ],
)
def test_a_wrong_encoding_is_named(
    config: BuildConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        replace(config, **change)
    with pytest.raises(DataError, match=r"encodings.quality: 0; expected 1 to 100"):
        Encoding("jpeg", 0)


def test_a_plan_is_a_value_and_reads_nothing_more(config: BuildConfig) -> None:
    excluded = records_excluded(config)
    manifest = read_manifest(Path(config.output))
    plan = plan_build(replace(excluded, incremental=True))
    shutil.rmtree(config.root)
    shutil.rmtree(config.output)
    described = [*plan.token_shards, *(s for view in plan.views.values() for s in view.shards)]
    stay = [shard for shard in described if shard in manifest.shards()]
    assert stay
    assert all(a is b for a, b in zip(plan.tasks(), plan.tasks(), strict=True))
    assert len(stay) + len(plan.tasks()) == len(described)
