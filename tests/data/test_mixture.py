"""The blend: proportions as asked for, epochs, and a held-out part that shares no image."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lapilli.data.config import MixtureConfig, SourceConfig
from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.errors import DataError
from lapilli.data.planning.mixture import Blend, Pool, blend, check_sources
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.manifest import read_manifest
from tests.factories import (
    Mixture,
    build_config,
    build_dataset,
    conversation,
    image_bytes,
    make_tokenizer,
)

SIZES = {"big": 3000, "mid": 700, "small": 120}
NAMES = list(SIZES)


def make_pool(sizes: dict[str, int] = SIZES, *, longest: int = 90, seed: int = 0) -> Pool:
    """Every third record text only, the rest with an image that two of them share."""
    rng = np.random.default_rng(seed)
    sources = np.repeat(np.arange(len(sizes)), list(sizes.values()))
    ids = [f"{name}/{n}" for name, size in sizes.items() for n in range(size)]
    images = [[] if n % 3 == 0 else [f"{n // 6}.jpg"] for n in range(len(ids))]
    return Pool(ids, sources, images, rng.integers(1, longest, len(ids)))


def mixed(pool: Pool | None = None, **config: Any) -> Blend:
    return blend(pool or make_pool(), MixtureConfig(**config), NAMES)


def used(found: Blend, pool: Pool | None = None, *, sizes: Any = 1) -> dict[str, int]:
    """By source the sum over an epoch, counted here and not taken from the facts."""
    pool = pool or make_pool()
    total: Counter[str] = Counter()
    for number, many in zip(
        pool.sources.tolist(), np.where(found.held_out, 0, found.repeats) * sizes, strict=True
    ):
        total[NAMES[number]] += int(many)
    return dict(total)


# ---- shares ------------------------------------------------------------------------------------


def test_without_settings_the_sources_stand_whole() -> None:
    found = mixed()
    assert found.repeats.tolist() == [1] * sum(SIZES.values())
    assert not found.held_out.any()
    assert set(found.splits.to_pylist()) == {"train"}


def test_a_weight_is_the_proportion_of_the_blend() -> None:
    """Not of its source: that mistake would give 0.6 x 3000 : 0.3 x 700 : 0.1 x 120."""
    found = used(mixed(weights={"big": 6, "mid": 3, "small": 1}))
    assert found == {"big": 720, "mid": 360, "small": 120}  # the largest without repeating


def test_a_total_repeats_what_is_too_small() -> None:
    blended = mixed(weights={"big": 0.5, "mid": 0.25, "small": 0.25}, total=4000)
    assert used(blended) == {"big": 2000, "mid": 1000, "small": 1000}
    small = blended.repeats[-120:]
    assert set(small.tolist()) == {8, 9}  # evenly: 1000 = 8 x 120 + 40


def test_epochs_bound_a_blend_by_weights() -> None:
    found = used(mixed(weights={"big": 6, "mid": 3, "small": 1}, epochs={"small": 2}))
    assert found == {"big": 1400, "mid": 700, "small": 233}  # mid is the bound now


@pytest.mark.parametrize(
    ("epochs", "records", "repeats"),
    [(0, 0, {0}), (0.25, 30, {0, 1}), (1, 120, {1}), (2, 240, {2}), (2.5, 300, {2, 3})],
)
def test_epochs_of_a_source(epochs: float, records: int, repeats: set[int]) -> None:
    found = mixed(epochs={"small": epochs})
    assert used(found) == SIZES | {"small": records}
    assert set(found.repeats[-120:].tolist()) == repeats


def test_counts_are_exact_and_the_others_whole() -> None:
    assert used(mixed(counts={"big": 17, "small": 500})) == {"big": 17, "mid": 700, "small": 500}


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.01, 100), min_size=3, max_size=3),
    total=st.integers(1, 20_000) | st.none(),
)
def test_shares_are_within_one_record_of_what_was_asked(
    weights: list[float], total: int | None
) -> None:
    config: dict[str, Any] = {"weights": dict(zip(NAMES, weights, strict=True)), "total": total}
    if not _whole(weights, total):
        with pytest.raises(DataError, match="no record is left to train on"):
            mixed(**config)
        return
    found = mixed(**config)
    records = used(found)
    whole = sum(records.values())
    assert total is None or whole == total
    for name, weight in config["weights"].items():
        assert abs(records[name] - whole * weight / sum(weights)) < 1
    if total is None:
        assert found.repeats.max() <= 1


def _whole(weights: list[float], total: int | None) -> int:
    """The size of the blend: as asked, or the largest in which no record stands twice."""
    sizes = zip(SIZES.values(), weights, strict=True)
    return total or int(min(size / (weight / sum(weights)) for size, weight in sizes))


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.floats(0.05, 20), min_size=3, max_size=3),
    image_tokens=st.sampled_from([0, 7]),
    total=st.integers(5_000, 1_000_000) | st.none(),
)
def test_by_tokens_shares_are_within_a_record_of_what_was_asked(
    weights: list[float], image_tokens: int, total: int | None
) -> None:
    pool = make_pool()
    sizes = pool.tokens + image_tokens * np.array([len(images) for images in pool.images])
    config: dict[str, Any] = {"weights": dict(zip(NAMES, weights, strict=True)), "total": total}
    tokens = used(mixed(unit="tokens", image_tokens=image_tokens, **config), sizes=sizes)
    longest = int(sizes.max())
    share = {name: weight / sum(weights) for name, weight in config["weights"].items()}
    whole = total or min(
        sizes[pool.sources == NAMES.index(name)].sum() / share[name] for name in NAMES
    )
    for name in NAMES:
        assert abs(tokens[name] - whole * share[name]) <= longest / 2 + 2


def test_the_facts_are_what_the_columns_say() -> None:
    pool = make_pool()
    config = {"weights": {"big": 1, "mid": 1, "small": 2}, "total": 1000, "held_out": 0.1}
    found = mixed(pool, **config, image_tokens=5)
    facts = found.facts
    tokens = pool.tokens + 5 * np.array([len(images) for images in pool.images])
    assert facts["records"] == 1000
    assert facts["held_out"] == found.held_out.sum() == 382
    for name, by in facts["sources"].items():
        own = pool.sources == NAMES.index(name)
        train = np.where(found.held_out, 0, found.repeats)
        assert by["kept"] == own.sum() == SIZES[name]
        assert by["held_out"] == found.held_out[own].sum()
        assert by["records"] == train[own].sum()
        assert by["used"] == np.count_nonzero(train[own])
        assert by["tokens"] == (train * tokens)[own].sum()
        assert by["share"] == by["records"] / 1000
        assert by["epochs"] == pytest.approx(by["records"] / (by["kept"] - by["held_out"]))
    json.dumps(facts)


# ---- chance ------------------------------------------------------------------------------------


def test_a_part_follows_from_the_seed() -> None:
    first = mixed(epochs={"big": 0.3}, seed=1)
    assert first.repeats.tolist() == mixed(epochs={"big": 0.3}, seed=1).repeats.tolist()
    assert first.repeats.tolist() != mixed(epochs={"big": 0.3}, seed=2).repeats.tolist()


def test_a_smaller_part_lies_in_a_larger() -> None:
    small, large = mixed(epochs={"big": 0.2}), mixed(epochs={"big": 0.5})
    assert (small.repeats <= large.repeats).all()
    assert used(small)["big"] == 600


def test_a_records_lot_does_not_hang_on_its_place() -> None:
    pool = make_pool()
    order = [int(i) for i in np.random.default_rng(0).permutation(len(pool.sample_ids))]
    shuffled = Pool(
        [pool.sample_ids[i] for i in order],
        pool.sources[order],
        [pool.images[i] for i in order],
        pool.tokens[order],
    )
    config: dict[str, Any] = {"epochs": {"big": 0.3}, "held_out": 0.05}
    there, here = mixed(pool, **config), mixed(shuffled, **config)
    assert there.repeats[order].tolist() == here.repeats.tolist()
    assert there.held_out[order].tolist() == here.held_out.tolist()


# ---- held out ----------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    images=st.lists(
        st.lists(st.sampled_from("abcdefghijklmnop"), max_size=3), min_size=2, max_size=40
    ),
    held_out=st.floats(0, 0.9) | st.integers(1, 10),
    seed=st.integers(0, 3),
)
def test_no_image_is_on_both_sides(images: list[list[str]], held_out: float, seed: int) -> None:
    pool = Pool(
        [f"s/{n}" for n in range(len(images))],
        np.zeros(len(images), np.int64),
        images,
        np.ones(len(images), np.int64),
    )
    config = MixtureConfig(held_out=held_out, seed=seed)
    asked = round(held_out * len(images)) if held_out < 1 else held_out
    if asked >= len(images):
        with pytest.raises(DataError, match="so that some are left to train on"):
            blend(pool, config, ["s"])
        return
    found = blend(pool, config, ["s"])
    sides = [
        {
            image
            for images, held in zip(pool.images, found.held_out, strict=True)
            if held == side
            for image in images
        }
        for side in (True, False)
    ]
    assert not sides[0] & sides[1]
    assert found.held_out.sum() <= asked


def test_images_bind_records_through_others() -> None:
    chain = [["a", "b"], ["b", "c"], ["c", "d"], ["e"], []]
    pool = Pool([f"s/{n}" for n in range(5)], np.zeros(5, np.int64), chain, np.ones(5, np.int64))
    seen = {
        tuple(blend(pool, MixtureConfig(held_out=3, seed=seed), ["s"]).held_out[:3].tolist())
        for seed in range(20)
    }
    assert seen == {(True, True, True), (False, False, False)}


def test_a_number_is_held_out_exactly_where_images_allow() -> None:
    """As vlm_training keeps 5,000 for validation."""
    found = mixed(held_out=500)
    assert found.held_out.sum() == 500
    assert found.repeats[found.held_out].tolist() == [1] * 500
    assert found.splits.to_pylist().count("held_out") == 500
    by = found.facts["sources"]
    assert 350 < by["big"]["held_out"] < 430  # about its share of 3820
    assert mixed(held_out=0.25).held_out.sum() == 955


def test_what_is_held_out_is_in_no_blend() -> None:
    found = mixed(held_out=0.5, weights={"big": 1, "mid": 1, "small": 1}, total=9000)
    assert used(found) == dict.fromkeys(NAMES, 3000)
    assert found.repeats[found.held_out].max() == 1


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"weights": {"big": -1}}, r"mixture.weights: .*expected 0 or more"),
        ({"weights": {"big": float("nan")}}, "expected 0 or more"),
        ({"weights": {"big": float("inf")}}, "none infinite"),
        ({"weights": {"big": 0}}, "expected one above 0"),
        ({"weights": {"big": 1}, "counts": {"big": 1}}, "both given"),
        ({"total": 10}, "and the weights it is divided by"),
        ({"weights": {"big": 1}, "total": 0}, "mixture.total: 0"),
        ({"epochs": {"big": -0.5}}, "mixture.epochs"),
        ({"image_tokens": -1}, "mixture.image_tokens: -1"),
        ({"held_out": -0.1}, "expected a share below 1"),
        ({"held_out": 1.5}, "expected a share below 1"),
        ({"held_out": float("nan")}, "expected a share below 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        MixtureConfig(**config)


def test_names_are_those_of_sources(tmp_path: Path) -> None:
    mixture = Mixture(tmp_path, [SourceConfig("a", "a.json"), SourceConfig("b", "b.json")], {}, [])

    def config(**settings: Any) -> None:
        build_config(mixture, tmp_path, tmp_path, mixture=MixtureConfig(**settings))

    config(weights={"a": 1, "b": 0})
    with pytest.raises(DataError, match=r"mixture.epochs: 'c' is no source; expected of a, b"):
        config(epochs={"c": 1})
    with pytest.raises(DataError, match="source b has none; give it one, 0 to leave it out"):
        config(weights={"a": 1})


def test_a_source_that_is_asked_for_must_have_records() -> None:
    config = MixtureConfig(weights={"a": 1, "b": 0})
    check_sources(config, {"a": 1})
    with pytest.raises(DataError, match="no record of source a"):
        check_sources(config, {"b": 1})
    pool = make_pool({"big": 10, "mid": 10})
    with pytest.raises(DataError, match="no record of source small"):
        mixed(pool, counts={"small": 1})
    assert used(mixed(pool), pool) == {"big": 10, "mid": 10}
    with pytest.raises(DataError, match="no record is left to train on"):
        mixed(epochs=dict.fromkeys(NAMES, 0))
    with pytest.raises(DataError, match=r"mixture.held_out: 4000 of 3820 kept records"):
        mixed(held_out=4000)


# ---- in a dataset ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources over the same eight images, one of them not decodable."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "root" / "images").mkdir(parents=True)
    for number in range(8):
        data = b"no image" if number == 7 else image_bytes("png", seed=number)
        (folder / "root" / "images" / f"{number}.png").write_bytes(data)
    for name, size in (("one", 40), ("two", 16)):
        elements = [conversation(n, f"images/{n % 8}.png", seed=size) for n in range(size)]
        elements += [conversation(f"text {n}") for n in range(size // 4)]
        (folder / "root" / f"{name}.json").write_text(json.dumps(elements))
    make_tokenizer(folder / "tokenizer")
    return folder


def made(folder: Path, name: str, **config: Any) -> Path:
    sources = [SourceConfig("one", "one.json"), SourceConfig("two", "two.json")]
    mixture = Mixture(folder / "root", sources, {}, [])
    settings = MixtureConfig(**config)
    build_dataset(mixture, folder / name, folder / "tokenizer", mixture=settings)
    return folder / name


def test_a_dataset_is_an_epoch_of_its_blend(folder: Path) -> None:
    path = made(folder, "blended", weights={"one": 0.25, "two": 0.75}, total=200, held_out=14)
    manifest = read_manifest(path)
    assert manifest.counts["read"] == manifest.counts["kept"] + manifest.counts["quarantined"] == 70
    assert manifest.counts["kept"] == 63
    train = open_dataset(path, view="pad32", image_tokens=4)
    held = open_dataset(path, view="pad32", image_tokens=4, split="held_out")
    ids = [train.sample(i).sample_id for i in range(len(train))]
    shares = Counter(sample_id.partition("/")[0] for sample_id in ids)
    assert shares == {"one": 50, "two": 150}
    assert {n: f["share"] for n, f in manifest.mixture["sources"].items()} == {
        "one": 0.25,
        "two": 0.75,
    }
    kept = pa.ipc.open_file(str(path / "selection.arrow")).read_all().to_pylist()
    assert len(kept) == 63  # the selection names every kept record once, in the blend or not
    apart = [held.sample(i).sample_id for i in range(len(held))]
    assert len(set(apart)) == len(apart) == manifest.mixture["held_out"] <= 14
    images = [
        {i for n in range(len(d)) for i in d.token_row(n)["image_ids"]} for d in (train, held)
    ]
    assert all(images)
    assert not images[0] & images[1]


def test_lengths_follow_the_repeated_rows(folder: Path) -> None:
    path = made(folder, "twice", epochs={"one": 2, "two": 0})
    dataset = open_dataset(path, view="pad32", image_tokens=4)
    assert len(dataset) == 2 * (35 + 10)
    for index in range(len(dataset)):
        row = dataset.token_row(index)
        assert dataset.num_trained[index] == row["num_trained"]
        assert dataset.num_images[index] == len(row["image_ids"])
    limit = int(np.median(dataset.lengths))
    short = open_dataset(path, view="pad32", image_tokens=4, max_length=limit)
    assert len(short) + short.too_long == len(dataset)


def test_the_blend_changes_no_shard(folder: Path) -> None:
    plain, other = (
        read_manifest(made(folder, n, **c))
        for n, c in (("plain", {}), ("apart", {"held_out": 0.2, "epochs": {"one": 3}}))
    )
    assert plain.tokens == other.tokens
    assert {n: v.shards for n, v in plain.views.items()} == {
        n: v.shards for n, v in other.views.items()
    }
    assert plain.selection.sha256 != other.selection.sha256
    assert plain.fingerprint != other.fingerprint
    again = read_manifest(made(folder, "apart", held_out=0.2, epochs={"one": 3}))
    assert asdict(again) == asdict(other)


def test_a_changed_mixture_is_named(folder: Path) -> None:
    made(folder, "named", epochs={"one": 2})
    with pytest.raises(DataError, match="was built with another mixture; expected the same"):
        made(folder, "named", epochs={"one": 3})


def test_a_split_that_is_not_there_is_named(folder: Path) -> None:
    path = made(folder, "whole")
    with pytest.raises(DataError, match=r"holds nothing out; set `mixture.held_out`"):
        open_dataset(path, view="pad32", image_tokens=4, split="held_out")
    with pytest.raises(DataError, match="split: 'test'; expected train or held_out"):
        open_dataset(path, view="pad32", image_tokens=4, split="test")


def test_a_source_of_the_mixture_without_records_stops_before_decoding(folder: Path) -> None:
    (folder / "root" / "bad.json").write_text(json.dumps([conversation("a", "nowhere.png")]))
    sources = [SourceConfig("one", "one.json"), SourceConfig("bad", "bad.json")]
    settings = MixtureConfig(weights={"one": 1, "bad": 1})
    config = build_config(
        Mixture(folder / "root", sources, {}, []),
        folder / "x",
        folder / "tokenizer",
        mixture=settings,
    )
    with pytest.raises(DataError, match="no record of source bad is kept"):
        plan_build(config)
