"""Teachers' features as shards: built, read by slot, verified, repaired, amended."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.repair import repair_dataset
from lapilli.data.building.runners import run_here
from lapilli.data.config import TargetConfig
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.dataset.targets import open_targets
from lapilli.data.dataset.verify import verify_dataset
from lapilli.data.errors import DataError
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.target_rows import decode_rows, encode_rows, stored_rows
from lapilli.data.trust import NOTHING
from tests.factories import build_config, build_dataset, make_mixture, make_tokenizer
from tests.teaching import block_means

TARGET = TargetConfig("tests.teaching:blocks", rows=16, width=6, size=32, batch_size=3)
SHARD_BYTES = 4 * TARGET.image_bytes


def opened(path: Path) -> Dataset:
    return open_dataset(path, view="pad32", image_tokens=4)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def made(tmp_path: Path, tokenizer: Path) -> Any:
    """A mixture whose view `pad32` has the pixels that the teacher is given: square images."""
    return make_mixture(tmp_path / "root", images=9, text_only=2), tmp_path / "out", tokenizer


def features_of(dataset: Dataset, name: str = "blocks") -> dict[int, np.ndarray]:
    """What is stored, by slot."""
    reader, found = open_targets(dataset, name), dict[int, np.ndarray]()
    for index in range(len(dataset)):
        for slot in dataset.image_slots(index).tolist():
            stored = reader.read(slot)
            if stored is not None:
                found[slot] = decode_rows(*stored)
    return found


def stretched(dataset: Dataset) -> dict[int, np.ndarray]:
    """The pixels of a view made as the teacher's are, by slot."""
    view = open_dataset(dataset.path, view="same", image_tokens=4)
    return {
        slot: view.sample(index).pixels[place]
        for index in range(len(view))
        for place, slot in enumerate(view.image_slots(index).tolist())
    }


def with_view(config: Any) -> Any:
    """The settings with a view beside the others that is made as for the teacher."""
    same = replace(config.views["pad32"], aspect="stretch", resizer="pillow", fill=(0, 0, 0))
    return replace(config, views={**config.views, "same": same})


@pytest.mark.parametrize(
    ("storage", "pool", "most"), [("int8", 1, 0.006), ("bf16", 1, 0.004), ("int8", 2, 0.006)]
)
def test_features_are_the_teachers_by_slot(made: Any, storage: Any, pool: int, most: float) -> None:
    target = replace(TARGET, storage=storage, pool=pool)
    size = 4 * target.image_bytes
    config = with_view(build_config(*made, targets={"blocks": target}, shard_bytes=size))
    report = build(plan_build(config), runner=run_here)
    facts = report.manifest.targets["blocks"]
    dataset = opened(made[1])
    found, pixels = features_of(dataset), stretched(dataset)
    assert len(facts.shards) > 1
    assert found.keys() == pixels.keys()
    assert facts.statuses == {"ok": len(found)}
    differences, lengths = [], []
    for slot, rows in found.items():
        taught = block_means(pixels[slot][None], 16, 6)
        if pool == 2:
            grid = taught.reshape(4, 4, 6)
            taught = np.stack(
                [grid[y : y + 2, x : x + 2].mean((0, 1)) for y in (0, 2) for x in (0, 2)]
            )
        expected = taught.reshape(16 // pool**2, 6)
        np.testing.assert_allclose(rows, expected, atol=most)
        differences.append(np.square(rows - expected).sum())
        lengths.append(np.square(expected).sum())
    assert facts.error == pytest.approx((sum(differences) / sum(lengths)) ** 0.5, rel=1e-3)
    assert 0 < facts.error < most


def test_a_dataset_without_targets_is_what_it_was(made: Any) -> None:
    plain = build_dataset(*made).manifest
    assert plain.targets == {}
    assert not any(name.startswith("targets") for name in plain.plan)
    assert not (made[1] / "targets").exists()


def test_an_image_that_the_teacher_refuses_has_a_status_and_no_features(made: Any) -> None:
    odd = replace(TARGET, teacher="tests.teaching:odd", settings={"least": 128})
    config = with_view(build_config(*made, targets={"blocks": odd}))
    facts = build(plan_build(config), runner=run_here).manifest.targets["blocks"]
    dataset = opened(made[1])
    dark = {
        s
        for s, p in stretched(dataset).items()
        if p[
            :,
            :,
        ]
        .reshape(32, 32, 3)[:, 0]
        .mean()
        < 128
    }
    assert dark
    assert features_of(dataset).keys() == stretched(dataset).keys() - dark
    assert facts.statuses == {"ok": 9 - len(dark), "refused": len(dark)}


def test_images_that_cannot_be_decoded_take_no_place_in_a_batch(
    tmp_path: Path, tokenizer: Path
) -> None:
    mixture = make_mixture(tmp_path / "root", images=9, defects=True)
    config = with_view(
        build_config(mixture, tmp_path / "out", tokenizer, targets={"blocks": TARGET})
    )
    facts = build(plan_build(config), runner=run_here).manifest.targets["blocks"]
    dataset = opened(tmp_path / "out")
    pixels = stretched(dataset)
    for slot, rows in features_of(dataset).items():
        np.testing.assert_allclose(rows, block_means(pixels[slot][None], 16, 6)[0], atol=0.006)
    assert set(facts.statuses) > {"ok"}


def test_damaged_features_are_found_and_made_again(made: Any) -> None:
    manifest = build_dataset(*made, targets={"blocks": TARGET}, shard_bytes=SHARD_BYTES).manifest
    victim = made[1] / manifest.targets["blocks"].shards[1].path
    whole = victim.read_bytes()
    victim.write_bytes(whole[:-200] + bytes(200))
    assert [damage.path for damage in verify_dataset(made[1]).damaged] == [
        manifest.targets["blocks"].shards[1].path
    ]
    config = replace(build_config(*made, targets={"blocks": TARGET}, shard_bytes=SHARD_BYTES))
    assert repair_dataset(made[1], config, runner=run_here) == 1
    assert victim.read_bytes() == whole


def test_an_incremental_build_makes_what_is_new_and_nothing_else(made: Any) -> None:
    first = build_dataset(*made, shard_bytes=SHARD_BYTES)
    changes = {"targets": {"blocks": TARGET}, "incremental": True, "shard_bytes": SHARD_BYTES}
    second = build_dataset(*made, **changes)
    assert second.shards_built == len(second.manifest.targets["blocks"].shards)
    assert second.manifest.views == first.manifest.views
    assert second.manifest.fingerprint != first.manifest.fingerprint
    assert build_dataset(*made, **changes).shards_built == 0
    other = replace(TARGET, settings={"seconds": 0})
    third = build_dataset(*made, **{**changes, "targets": {"blocks": other}})
    assert third.shards_built == second.shards_built
    gone = {f.path for f in second.manifest.targets["blocks"].shards}
    assert not any((made[1] / path).exists() for path in gone)
    with pytest.raises(DataError, match="another targets blocks"):
        build_dataset(*made, targets={"blocks": TARGET}, shard_bytes=SHARD_BYTES)


def test_storing_rounds_to_the_nearest() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 7)).astype(np.float32) * 50
    rows[3] = 0
    for storage, bound in (
        ("int8", np.abs(rows).max(1) / 127 / 2),
        ("bf16", np.abs(rows).max(1) / 256),
    ):
        features, scales = encode_rows(rows, storage)  # type: ignore[arg-type]
        buffers = [np.frombuffer(data, np.uint8) for data in (features, scales)]
        found = decode_rows(*stored_rows(buffers[0], buffers[1], 40, 7))
        assert (np.abs(found - rows).max(1) <= bound * 1.0001).all()
    buffers = [np.frombuffer(data, np.uint8) for data in encode_rows(rows, "int8")]
    with pytest.raises(ValueError, match="280 and 160 bytes"):
        stored_rows(buffers[0], buffers[1], 40, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"teacher": "depht"}, "targets.teacher: 'depht' is unknown; expected one of depth_"),
        ({"teacher": "tests.teaching:nothing"}, "does not import"),
        (
            {"rows": 4, "settings": {"more": 1}, "width": 5, "teacher": "tests.teaching:wide"},
            "gives",
        ),
        ({"teacher": "depth_anything_v2"}, "cannot be made: pretrained: empty"),
    ],
)
def test_a_teacher_that_is_wrong_is_one_line(
    made: Any, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=words) as said:
        build_dataset(*made, targets={"blocks": replace(TARGET, **changes)})
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"pool": 3}, "targets.pool: 3 of 16"), ({"rows": 0}, "targets.rows: 0"),
     ({"num_gpus": -1.0}, "targets.num_gpus")],
)  # fmt: skip
def test_settings_that_make_no_sense_are_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        replace(TARGET, **changes)


def test_a_teacher_of_ones_own_is_not_imported_for_a_foreign_dataset(made: Any) -> None:
    build_dataset(*made, targets={"blocks": TARGET})
    with pytest.raises(DataError, match=r"targets.blocks.teacher asks for code .*--allow_code"):
        read_build_config(made[1], NOTHING)


def test_a_dataset_says_which_targets_it_has(made: Any) -> None:
    build_dataset(*made, targets={"blocks": TARGET})
    with pytest.raises(DataError, match=r"targets: 'depth' is not in .*, which has blocks"):
        open_targets(opened(made[1]), "depth")
    victim = next((made[1] / "targets" / "blocks").glob("*.arrow"))
    victim.write_bytes(victim.read_bytes()[:-8])
    with pytest.raises(DataError, match="missing or cut short"):
        open_targets(opened(made[1]), "blocks")
