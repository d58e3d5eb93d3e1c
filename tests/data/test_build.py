"""A build: kept + quarantined = read, bytes that follow the plan alone, nothing done twice."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapilli.data.building.driver import BuildReport, build
from lapilli.data.building.run_task import run_task
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs
from lapilli.data.images.view import BadImage, prepare
from lapilli.data.io.atomic import ShardFacts
from lapilli.data.io.remote_path import Output
from lapilli.data.planning.disk import check_disk
from lapilli.data.planning.plan import plan_build
from lapilli.data.planning.shard_task import ImageTask, Task
from lapilli.data.record import Reason
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.encode import encode, load_tokenizer
from tests.factories import (
    BAD_KINDS,
    Mixture,
    bad_image,
    build_config,
    build_dataset,
    conversation,
    image_bytes,
    make_mixture,
    make_tokenizer,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    return make_mixture(tmp_path_factory.mktemp("mixture") / "root", images=20, defects=True)


@pytest.fixture(scope="module")
def config(
    mixture: Mixture, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory
) -> BuildConfig:
    """Settings whose output is built by `report`; other tests build elsewhere."""
    return build_config(mixture, tmp_path_factory.mktemp("built") / "out", tokenizer)


@pytest.fixture(scope="module")
def report(config: BuildConfig) -> BuildReport:
    return build(plan_build(config), runner=run_here)


def arrow(path: Path) -> list[dict[str, Any]]:
    with pa.ipc.open_file(str(path)) as reader:
        return reader.read_all().to_pylist()


def hashes(output: Path) -> dict[str, str]:
    files = sorted(output.rglob("*.arrow"))
    assert files
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def build_here(config: BuildConfig, **changes: Any) -> BuildReport:
    return build(plan_build(replace(config, **changes)), runner=run_here)


def selected(output: Path) -> list[str]:
    return [row["sample_id"] for row in arrow(output / "selection.arrow")]


def quarantined(output: Path) -> list[dict[str, Any]]:
    return pq.read_table(output / "quarantine.parquet").to_pylist()


# ---- what is in it -----------------------------------------------------------------------------


@pytest.mark.usefixtures("report")
def test_every_record_is_kept_or_quarantined_for_the_right_reason(
    mixture: Mixture, config: BuildConfig
) -> None:
    output = Path(config.output)
    reasons = {row["sample_id"]: row["reason"] for row in quarantined(output)}
    verdicts = dict.fromkeys(selected(output)) | reasons
    assert len(selected(output)) + len(reasons) == len(mixture.expected)
    assert verdicts == mixture.expected
    # No template of LLaVA's can give the first two, no file the others.
    planted = set(Reason) - {
        Reason.NO_TRAINED_TOKEN,
        Reason.TEMPLATE_REFUSES,
        Reason.EXCLUDED,
        Reason.DECODER_CRASHED,
        Reason.IMAGE_UNREADABLE,  # root reads everything
    }
    assert set(reasons.values()) == {str(reason) for reason in planted}


@pytest.mark.usefixtures("report")
def test_the_quarantine_holds_the_records(mixture: Mixture, config: BuildConfig) -> None:
    elements = json.loads((mixture.root / "mixture.json").read_text())
    by_sample = dict(zip(mixture.expected, elements, strict=True))
    for row in quarantined(Path(config.output)):
        assert json.loads(row["record"]) == by_sample[row["sample_id"]]
        assert row["source"] == "made_up"
        assert row["sample_id"].startswith(f"made_up/{row['record_id']}")
        assert row["detail"]


def test_an_element_that_has_changed_since_is_not_taken_for_the_record(
    tmp_path: Path, tokenizer: Path
) -> None:
    """What is found while decoding is read again; by then the file may be another."""
    mixture = make_mixture(tmp_path / "root", images=2, defects=True)
    config = build_config(mixture, tmp_path / "out", tokenizer)
    plan = plan_build(config)
    path = mixture.root / "mixture.json"
    changed = path.read_text().replace('"image html"', '"another"')
    path.write_text(changed)
    build(plan, runner=run_here)
    rows = {row["sample_id"]: row["record"] for row in quarantined(Path(config.output))}
    assert "has changed since" in rows["made_up/image html"]
    assert json.loads(rows["made_up/image bomb"])["id"] == "image bomb"


def test_the_counts_are_those_of_the_files(
    mixture: Mixture, config: BuildConfig, report: BuildReport
) -> None:
    counts = report.manifest.counts
    bad = Counter(reason for reason in mixture.expected.values() if reason)
    assert counts["read"] == len(mixture.expected) == counts["kept"] + counts["quarantined"]
    assert counts["kept"] == len(selected(Path(config.output)))
    assert counts["reasons"] == {str(reason): number for reason, number in sorted(bad.items())}
    assert counts["sources"] == {"made_up": len(mixture.expected)}
    assert counts["repairs"] == {"alias": 1, "case": 1, "extension": 1}
    rows = sum(shard.rows for shard in report.manifest.views["pad32"].shards)
    assert counts["images"] == rows


def test_pixels_are_those_of_prepare(config: BuildConfig, report: BuildReport) -> None:
    for view, spec in config.views.items():
        rows = [
            row
            for shard in report.manifest.views[view].shards
            for row in arrow(Path(config.output) / shard.path)
        ]
        assert len({row["image_id"] for row in rows}) == len(rows)
        for row in rows:
            data = (Path(config.root) / row["image_id"]).read_bytes()
            try:
                expected: tuple[str, bytes | None] = "ok", prepare(data, spec).tobytes()
            except BadImage as bad:
                expected = str(bad.reason), None
            assert (row["status"], row["pixels"]) == expected
            assert row["encoding"] == "raw"
            assert (row["source_width"] is None) == (row["status"] != "ok")


def test_token_rows_are_those_of_encode(config: BuildConfig, report: BuildReport) -> None:
    tokenizer = load_tokenizer(config.tokenizer)
    plan = plan_build(config)
    records = {e.sample_id: e.record for e in plan.entries}
    rows = [row for s in report.manifest.tokens for row in arrow(Path(config.output) / s.path)]
    assert len(rows) > len(selected(Path(config.output)))  # those a decoder refused are here too
    for row in rows:
        record = records[row["sample_id"]]
        assert record is not None
        input_ids, labels = encode(record, tokenizer, "v1")
        spans = row["label_spans"]
        trained = {i for s, e in zip(spans[::2], spans[1::2], strict=True) for i in range(s, e)}
        assert row["input_ids"] == input_ids
        assert trained == {i for i, label in enumerate(labels) if label != -100}
        assert row["num_trained"] == len(trained)
        assert row["text_length"] == sum(i != -200 for i in input_ids)
        assert len(row["image_ids"]) == input_ids.count(-200)


def test_the_selection_points_at_rows_and_slots(config: BuildConfig, report: BuildReport) -> None:
    output, manifest = Path(config.output), report.manifest
    tokens = [arrow(output / shard.path) for shard in manifest.tokens]
    view = manifest.views["crop24"]
    images = [arrow(output / shard.path) for shard in view.shards]
    for row in arrow(output / "selection.arrow"):
        token = tokens[row["token_shard"]][row["token_row"]]
        assert token["sample_id"] == row["sample_id"]
        for name in ("text_length", "num_trained", "llava_length"):
            assert token[name] == row[name]
        places = [divmod(slot, view.images_per_shard) for slot in row["image_slots"]]
        found = [images[shard][place] for shard, place in places]
        assert [image["image_id"] for image in found] == token["image_ids"]
        assert all(image["status"] == "ok" for image in found)


def test_a_record_that_trains_nothing_is_quarantined(tmp_path: Path, tokenizer: Path) -> None:
    """One id alone has nothing before it that could predict it."""
    template = tmp_path / "bare.yaml"
    template.write_text('opening: ""\nanswer_end: ""\ndrops_user_text: true\n')
    short = conversation("short")
    short["conversations"][1]["value"] = "The"  # one token, with the space before it
    (tmp_path / "mixture.json").write_text(json.dumps([short, conversation("long")]))
    (tmp_path / "images").mkdir()
    sources = make_mixture(tmp_path / "other").sources
    mixture = Mixture(tmp_path, sources, {}, [])
    report = build_dataset(mixture, tmp_path / "out", tokenizer, template=str(template))
    assert report.manifest.counts["reasons"] == {"no_trained_token": 1}
    assert selected(tmp_path / "out") == ["made_up/long"]
    row = next(row for row in arrow(next((tmp_path / "out" / "tokens").rglob("*.arrow")))[1:])
    assert row["label_spans"] == [1, len(row["input_ids"])]


def test_the_settings_lie_in_the_dataset(config: BuildConfig, report: BuildReport) -> None:
    del report
    from pipelines.cli.command import parse

    again = parse(BuildConfig, [f"--config={Path(config.output) / 'config.json'}"], "")
    assert again == config


# ---- the same bytes, nothing twice -------------------------------------------------------------


@pytest.mark.usefixtures("report")
def test_order_and_place_of_the_work_decide_no_byte(config: BuildConfig, tmp_path: Path) -> None:
    def backwards(tasks: list[Task], output: Output, workers: int) -> Any:
        return run_here(tasks[::-1], output, workers)

    plan = plan_build(replace(config, output=str(tmp_path / "out"), num_workers=3))
    again = build(plan, runner=backwards)
    assert hashes(tmp_path / "out") == hashes(Path(config.output))
    assert again.manifest.fingerprint == read_manifest(Path(config.output)).fingerprint


def refuse(tasks: list[Task], output: Output, workers: int) -> Any:
    del output, workers
    assert not tasks
    return iter(())


def test_a_finished_build_does_no_work_again(config: BuildConfig, report: BuildReport) -> None:
    before = hashes(Path(config.output))
    again = build(plan_build(config), runner=refuse)
    assert (again.shards_built, again.shards_reused) == (0, report.shards_built)
    assert again.manifest == report.manifest
    assert hashes(Path(config.output)) == before


def test_a_plan_can_be_built_twice(config: BuildConfig, tmp_path: Path) -> None:
    """Building changes no plan, though it finds more to quarantine."""
    plan = plan_build(replace(config, output=str(tmp_path / "out")))
    first = build(plan, runner=run_here)
    assert build(plan, runner=refuse).manifest == first.manifest


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no facts", "empty"])
def test_what_is_damaged_is_made_again(config: BuildConfig, tmp_path: Path, damage: str) -> None:
    output = tmp_path / "out"
    shutil.copytree(config.output, output)
    victims = [next((output / kind).rglob("*.arrow")) for kind in ("tokens", "images")]
    for path in victims:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        if damage == "gone":
            path.unlink()
        elif damage == "no facts":
            path.with_name(f"{path.name}.json").unlink()
        else:
            path.write_bytes({"cut": data[:-1], "flipped": data, "empty": b""}[damage])
    again = build_here(config, output=str(output))
    assert again.shards_built == len(victims)
    assert hashes(output) == hashes(Path(config.output))


def test_a_build_that_was_stopped_goes_on(config: BuildConfig, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def stopped(tasks: list[Task], where: Output, workers: int) -> Any:
        yield from run_here(tasks[:3], where, workers)
        (output / "images" / "pad32").mkdir(parents=True, exist_ok=True)
        (output / "images" / "pad32" / ".00000.arrow.0123.tmp").write_bytes(b"half")
        raise KeyboardInterrupt

    plan = plan_build(replace(config, output=str(output)))
    with pytest.raises(KeyboardInterrupt):
        build(plan, runner=stopped)
    with pytest.raises(DataError, match="an unfinished build: run the same preprocess again"):
        read_manifest(output)
    progress: list[tuple[int, int]] = []
    again = build(plan, lambda done, total: progress.append((done, total)), runner=run_here)
    assert again.shards_reused == 3
    total = again.shards_built + 3
    assert progress == [(done, total) for done in range(3, total + 1)]
    assert not list(output.rglob("*.tmp"))


@pytest.mark.parametrize(
    ("now", "message"),
    [(None, "was there when the build was planned"), (b"other", "bytes when the build was pl")],
)
def test_a_file_that_changes_while_the_build_runs_stops_it_until_it_is_back(
    mixture: Mixture, tokenizer: Path, tmp_path: Path, now: bytes | None, message: str
) -> None:
    root = tmp_path / "root"
    shutil.copytree(mixture.root, root, symlinks=True)
    plan = plan_build(build_config(replace(mixture, root=root), tmp_path / "out", tokenizer))
    victim = root / plan.image_ids[0]
    victim.rename(tmp_path / "away")
    if now is not None:
        victim.write_bytes(now)
    with pytest.raises(DataError, match=f"1 images changed or vanished.*{message}.*same command"):
        build(plan, runner=run_here)
    with pytest.raises(DataError, match="unfinished"):
        read_manifest(tmp_path / "out")
    (tmp_path / "away").rename(victim)
    again = build(plan, runner=run_here)
    assert again.shards_built == 2  # one of each view
    assert again.manifest.counts["reasons"]["image_missing"] == 4
    build_dataset(mixture, tmp_path / "undisturbed", tokenizer)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "undisturbed")


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize("kind", ["tokens", "images/pad32"])
def test_a_shard_of_another_build_is_not_taken_for_this_one(
    mixture: Mixture, config: BuildConfig, tokenizer: Path, tmp_path: Path, kind: str
) -> None:
    """It is whole and has facts that fit it."""
    output, other = tmp_path / "out", tmp_path / "other"
    shutil.copytree(config.output, output)
    again = make_mixture(tmp_path / "root", images=20, defects=True, seed=1)
    build_dataset(again, other, tokenizer)
    strange, ours = (min((folder / kind).rglob("*.arrow")) for folder in (other, output))
    assert ours.read_bytes() != strange.read_bytes()
    for suffix in ("", ".json"):
        shutil.copyfile(f"{strange}{suffix}", f"{ours}{suffix}")  # under the name of ours
        shutil.copyfile(f"{strange}{suffix}", f"{ours.parent / strange.name}{suffix}")
    assert build_here(config, output=str(output)).shards_built == 1
    assert hashes(output) == hashes(Path(config.output))


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("report")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records_per_shard": 9}, r"another records_per_shard \(8, now 9\); expected the same"),
        ({"template": "plain", "shard_bytes": 77}, r"another template; another shard_bytes \("),
    ],
)
def test_a_change_is_refused_by_name(
    config: BuildConfig, change: dict[str, Any], message: str
) -> None:
    before = hashes(Path(config.output))
    with pytest.raises(DataError, match=message):
        build_here(config, **change)
    assert hashes(Path(config.output)) == before


@pytest.mark.parametrize("kind", ["file", "other files", "damaged plan"])
def test_a_folder_of_something_else_is_left_alone(
    config: BuildConfig, tmp_path: Path, kind: str
) -> None:
    output = tmp_path / "out"
    if kind == "file":
        output.write_text("precious")
    else:
        output.mkdir()
        (output / ("plan.json" if kind == "damaged plan" else "thesis.txt")).write_text("precious")
    with pytest.raises(DataError, match=r"output: .*choose another --output"):
        build_here(config, output=str(output))
    left = [path for path in (output, *output.rglob("*")) if path.is_file()]
    assert [path.read_text() for path in left] == ["precious"]


def test_an_empty_folder_is_taken(config: BuildConfig, tmp_path: Path) -> None:
    assert build_here(config, output=str(tmp_path)).manifest.counts["kept"] > 0


def test_a_small_disk_is_noticed_before_the_work(
    config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_build(replace(config, output=str(tmp_path / "out")))
    pixels = len(plan.image_ids) * sum(3 * spec.size**2 for spec in config.views.values())

    def usage(path: Path) -> Any:
        assert path.exists()
        return type("Usage", (), {"free": pixels - 1})

    monkeypatch.setattr(shutil, "disk_usage", usage)
    with pytest.raises(DataError, match=r"kB free, the shards need .* kB; free space"):
        build(plan, runner=run_here)
    assert not (tmp_path / "out").exists()
    check_disk(tmp_path / "out", plan.image_tasks()[1:])


def test_too_much_found_while_decoding_stops_the_build(tmp_path: Path, tokenizer: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=8, text_only=0)
    key = next(iter(sorted((tmp_path / "root" / "images").rglob("*.jpeg"))))
    key.write_bytes(bad_image("truncated_jpeg"))
    with pytest.raises(DataError, match=r"1 of 8 records .* over max_quarantined 0.1: image_undec"):
        build_dataset(mixture, tmp_path / "out", tokenizer, max_quarantined=0.1)
    with pytest.raises(DataError, match="unfinished"):
        read_manifest(tmp_path / "out")
    allowed = build_dataset(mixture, tmp_path / "out", tokenizer, max_quarantined=0.125)
    assert allowed.shards_built == 0  # the decoding was not for nothing
    assert allowed.manifest.counts["kept"] == 7


def test_when_no_image_can_be_decoded_nothing_is_kept(tmp_path: Path, tokenizer: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=len(BAD_KINDS), text_only=0)
    for path, kind in zip((tmp_path / "root" / "images").rglob("*.*"), BAD_KINDS, strict=True):
        path.write_bytes(bad_image(kind))
    with pytest.raises(DataError, match=r"7 of 7 records quarantined, nothing is kept.*fix the i"):
        build_dataset(mixture, tmp_path / "out", tokenizer)


def test_a_mixture_without_images_is_built(tmp_path: Path, tokenizer: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=0, text_only=5)
    manifest = build_dataset(mixture, tmp_path / "out", tokenizer).manifest
    assert manifest.counts["kept"] == 5
    assert manifest.views["pad32"].shards == []


def test_a_worker_with_other_libraries_stops(config: BuildConfig, tmp_path: Path) -> None:
    plan = plan_build(config)
    tokens, images = plan.token_tasks()[0], plan.image_tasks()[0]
    assert isinstance(images, ImageTask)
    for task in (
        replace(tokens, writer="pyarrow 1.0"),
        replace(images, writer="pyarrow 1.0"),
        replace(images, codecs=Codecs("pillow 1.0", "torch", "1.0")),
        replace(tokens, fingerprint="0" * 64),
    ):
        with pytest.raises(DataError, match=r"worker.* (same versions|same files)"):
            run_task(task, tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_pillow_says_of_a_file_is_not_printed(
    tmp_path: Path, tokenizer: Path, recwarn: pytest.WarningsRecorder
) -> None:
    mixture = make_mixture(tmp_path / "root", images=1, text_only=1)
    path = next((tmp_path / "root" / "images").rglob("*.jpeg"))
    path.write_bytes(image_bytes("png_palette_clear") + b"junk")
    path.with_suffix(".gif").write_bytes(image_bytes("gif"))
    build_dataset(mixture, tmp_path / "out", tokenizer)
    assert [str(w.message) for w in recwarn if "PIL" in str(w.filename)] == []


def test_facts_tell_the_truth(config: BuildConfig, report: BuildReport) -> None:
    manifest, output = report.manifest, Path(config.output)
    shards = [*manifest.tokens, *(s for v in manifest.views.values() for s in v.shards)]
    for facts in (*shards, manifest.selection):
        data = (output / facts.path).read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        assert facts == ShardFacts(facts.path, facts.rows, len(data), digest)
        assert len(arrow(output / facts.path)) == facts.rows
