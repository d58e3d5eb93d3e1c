"""A root in a store: what is built is what a folder of the same files gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lapilli.data.building.driver import build
from lapilli.data.building.runners import run_here
from lapilli.data.config import BuildConfig, SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.remote_path import open_output
from lapilli.data.planning.plan import plan_build
from lapilli.data.shards.manifest import Manifest
from lapilli.data.sources.root_address import moved_root, with_root_address
from tests.data.test_archives import write_tar, write_zip
from tests.factories import (
    Mixture,
    build_config,
    conversation,
    image_bytes,
    make_mixture,
    make_tokenizer,
)
from tests.object_store import serve_s3

KEYS = [
    "0/found.jpg", "coco/1.jpg", "coco/two.jpg", "coco/1.png", "gqa/images/0.jpg",
    "shards/0.tar/000.jpg", "table.parquet/image/0", "beside.jpg", "./coco//1.jpg", "no.jpg",
    "nowhere/1.jpg", "../out.jpg", "coco/bad.jpg",
]  # fmt: skip


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, BuildConfig]]:
    """The folder behind `s3://bucket/raw`, and what builds a dataset of it."""
    folder = tmp_path_factory.mktemp("s3")
    root = folder / "bucket" / "raw"
    mixture = make_mixture(root, images=14, text_only=3)
    photos = root / "images"
    for name in ("0/found.jpg", "coco/1.jpg", "coco/Two.JPG"):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        (photos / name).write_bytes(image_bytes("jpeg", 20, 30, seed=len(name)))
    (photos / "coco" / "bad.jpg").write_bytes(b"no image at all")
    (root / "text").mkdir()
    (root / "text" / "beside.jpg").write_bytes(image_bytes("jpeg", 9, 9))
    write_zip(photos / "gqa" / "images.zip", {f"images/{n}.jpg": image_bytes("jpeg", 9, 20 + n)
                                              for n in range(3)})  # fmt: skip
    write_tar(photos / "shards" / "0.tar", {"000.jpg": image_bytes("png", 12, 11)})
    pq.write_table(pa.table({"image": [image_bytes("png", 7, 12)]}), photos / "table.parquet")
    records = [conversation(f"r{number}", key) for number, key in enumerate(KEYS)]
    (root / "text" / "keys.json").write_text(json.dumps(records))
    sources = [*mixture.sources, SourceConfig("keys", "text/keys.json", "images")]
    tokenizer = make_tokenizer(folder / "tokenizer")
    mixture = Mixture(root, sources, {}, [])
    with serve_s3(folder, remembers="1h"):
        yield folder, build_config(mixture, folder / "local", tokenizer)


def built(config: BuildConfig) -> Manifest:
    return build(plan_build(with_root_address(config)), runner=run_here).manifest


def rows_of(manifest: Manifest, output: str, what: str) -> list[dict[str, Any]]:
    facts = getattr(manifest, what)
    data = (open_output(output) / facts.path).read_bytes()
    return pq.read_table(pa.BufferReader(data)).to_pylist()


def test_shards_are_those_of_a_folder(served: tuple[Path, BuildConfig]) -> None:
    """Byte for byte: images are named by their paths below the root, wherever it is."""
    folder, config = served
    store = replace(config, root="s3://bucket/raw", output=str(folder / "of_store"))
    local, remote = built(config), built(store)
    assert [s.sha256 for s in remote.shards()] == [s.sha256 for s in local.shards()]
    assert remote.fingerprint == local.fingerprint
    assert local.counts["reasons"] == {
        "ambiguous_image": 1, "image_missing": 2, "image_outside_root": 1, "image_undecodable": 1,
    }  # fmt: skip
    assert remote.counts == local.counts
    for what in ("quarantine", "repairs"):
        rows = rows_of(local, config.output, what)
        assert rows
        assert rows_of(remote, store.output, what) == rows
    # tokens are named by what they are made of, which has no time of a file
    assert [s.path for s in remote.tokens] == [s.path for s in local.tokens]


def test_images_at_an_address_of_their_own_keep_it(served: tuple[Path, BuildConfig]) -> None:
    _, config = served
    source = replace(config.sources[0], images="s3://bucket/raw/images")
    for root in (config.root, "s3://bucket/raw"):
        plan = plan_build(with_root_address(replace(config, root=root, sources=[source])))
        assert all(name.startswith("s3://bucket/raw/images/") for name in plan.image_ids)


@pytest.mark.parametrize("root", ["s3://bucket/raw", "s3://bucket/raw/"])
def test_a_recipe_of_a_store_is_moved(served: tuple[Path, BuildConfig], root: str) -> None:
    _, config = served
    stored = with_root_address(replace(config, root=root))
    assert moved_root(stored, config.root) == config
    assert moved_root(stored, "s3://other/place") == with_root_address(
        replace(config, root="s3://other/place")
    )
    assert moved_root(config, root) == stored


def test_a_dataset_that_names_images_by_address_is_not_amended(
    served: tuple[Path, BuildConfig],
) -> None:
    """As versions before did where the root was an address: all would be made again."""
    folder, config = served
    output = str(folder / "old")
    old = replace(config.sources[0], images="s3://bucket/raw/images")
    built(replace(config, root="s3://bucket/raw", sources=[old], output=output))
    for incremental in (False, True):
        again = replace(
            config, root="s3://bucket/raw", sources=config.sources[:1], output=output,
            incremental=incremental,
        )  # fmt: skip
        with pytest.raises(DataError, match=r"names its images by address .*another --output"):
            built(again)
    settings = json.loads((Path(output) / "config.json").read_text())
    assert settings["sources"] == [asdict(old) | {"annotations": "s3://bucket/raw/mixture.json"}]
