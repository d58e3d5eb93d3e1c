"""Verbs on a dataset in a bucket: repaired, reported, exported, from a folder that stays empty."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import lapilli.data.building.repair
import pipelines.preprocess
from lapilli.data.building.runners import run_here
from lapilli.data.errors import DataError
from lapilli.data.io.filesystems import open_storage
from lapilli.data.io.remote_path import RemotePath
from tests.factories import make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.pipelines.builds import RECIPE

DATASET = "s3://bucket/dataset"


@dataclass(frozen=True)
class Served:
    """The folder behind `s3://bucket`, a folder beside it, the server's port."""

    bucket: Path
    local: Path
    port: int

    def files(self, below: str) -> dict[str, str]:
        """SHA-256 of the objects below a prefix, as the server has them."""
        place = RemotePath(f"s3://bucket/{below}")
        return {
            str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in place.files()
        }


def here(tasks: Any, output: Any, workers: int, **_: object) -> Any:
    return run_here(tasks, output, workers)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    bucket, local = folder / "store" / "bucket", folder / "local"
    make_mixture(bucket / "raw", images=16, text_only=4)
    make_tokenizer(bucket / "tokenizer")
    (local / "empty").mkdir(parents=True)
    (local / "recipe.yaml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch, serve(folder / "store", remembers="1h") as port:
        patch.setenv("LAPILLI_CACHE", str(folder / "cache"))
        patch.chdir(local / "empty")
        patch.setattr(pipelines.preprocess, "run_on_ray", here)
        patch.setattr(lapilli.data.building.repair, "run_on_ray", here)
        with failing_proxy(port, lambda _: False) as (proxy, _), use_endpoint(proxy):
            served = Served(bucket, local, port)
            for root, output in (("s3://bucket", DATASET), (str(bucket), str(local / "dataset"))):
                call(
                    "preprocess", f"--config={local / 'recipe.yaml'}", f"--root={root}/raw",
                    f"--tokenizer={root}/tokenizer", f"--output={output}",
                )  # fmt: skip
            yield served
    assert [*(local / "empty").iterdir()] == []


def call(verb: str, *arguments: str, code: int = 0) -> None:
    assert importlib.import_module(f"pipelines.{verb}").main([*arguments]) == code


def test_damage_is_repaired_by_the_sources_of_the_store(
    served: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    """One shard has another byte, of the same size; another shard is gone."""
    before = served.files("dataset")
    flipped, gone = sorted(name for name in before if name.endswith(".arrow") and "/" in name)[::2][
        :2
    ]
    data = bytearray((RemotePath(DATASET) / flipped).read_bytes())
    data[len(data) // 2] ^= 1
    (RemotePath(DATASET) / flipped).write_bytes(bytes(data))
    (RemotePath(DATASET) / gone).unlink()
    call("verify", DATASET, code=1)
    said = capsys.readouterr().out
    assert f"{flipped}: damaged" in said
    assert f"{gone}: missing" in said
    assert f"lapilli repair {DATASET}" in said
    call("repair", DATASET, "--root=s3://bucket/raw")
    assert "2 shards made again" in capsys.readouterr().out
    assert served.files("dataset") == before
    call("repair", DATASET)
    call("repair", str(served.local / "dataset"), "--root=s3://bucket/raw")


def test_a_dataset_whose_sources_have_changed_is_left_alone(served: Served) -> None:
    before = served.files("dataset")
    name = next(name for name in before if name.startswith("tokens/") and name.endswith(".arrow"))
    data = (RemotePath(DATASET) / name).read_bytes()
    (RemotePath(DATASET) / name).write_bytes(data[:-1])
    damaged = served.files("dataset")
    make_mixture(served.bucket / "raw2", images=2)
    with pytest.raises(DataError, match="cannot be repaired: not as when it was built"):
        call("repair", DATASET, f"--root={served.bucket / 'raw2'}")
    assert served.files("dataset") == damaged
    (RemotePath(DATASET) / name).write_bytes(data)


def test_its_report_lies_beside_it(served: Served) -> None:
    call("report", DATASET)
    page = (RemotePath(DATASET) / "report.html").read_text()
    call("report", str(served.local / "dataset"))
    assert page == (served.local / "dataset" / "report.html").read_text()


def test_its_tars_are_those_of_a_folder(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    tars = "s3://bucket/tars"
    to_store = (
        "--to=webdataset",
        f"--dataset={DATASET}",
        f"--output={tars}",
        "--samples_per_tar=6",
    )
    call("export", *to_store)
    call(
        "export", "--to=webdataset", f"--dataset={served.local / 'dataset'}", "--samples_per_tar=6",
        f"--output={served.local / 'tars'}",
    )  # fmt: skip
    made = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (served.local / "tars").iterdir()
    }
    assert len(made) >= 4
    assert served.files("tars") == made
    (RemotePath(tars) / "train-000001.tar").unlink()
    capsys.readouterr()
    call("export", *to_store)
    assert "1 tars built, " in capsys.readouterr().out
    assert served.files("tars") == made
    with pytest.raises(DataError, match="holds the export of another dataset or with another"):
        call("export", *to_store[:-1], "--samples_per_tar=5")


# ---- what a store refuses ------------------------------------------------------------------------


def writing(served: Served, bucket: str) -> list[tuple[str, ...]]:
    """The commands that write into a bucket."""
    recipe, local = served.local / "recipe.yaml", served.local / "dataset"
    return [
        ("preprocess", f"--config={recipe}", f"--root={served.bucket}/raw",
         f"--tokenizer={served.bucket}/tokenizer", f"--output=s3://{bucket}/new"),
        ("repair", f"s3://{bucket}/dataset"),
        ("report", f"s3://{bucket}/dataset"),
        ("export", "--to=webdataset", f"--dataset={local}", f"--output=s3://{bucket}/new"),
        ("export", "run", "--to=hf", f"--output=s3://{bucket}/new"),
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize(
    ("bucket", "denied", "key"),
    [("nowhere", (), True), ("bucket", ("PUT",), True), ("bucket", (), False)],
    ids=["wrong bucket", "read-only", "no credentials"],
)
def test_what_cannot_be_written_is_one_line_before_the_work(
    served: Served, bucket: str, denied: tuple[str, ...], key: bool, number: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """No sample is read, and the store is not asked again and again."""
    seen: list[str] = []
    verb, *arguments = writing(served, bucket)[number]
    monkeypatch.setattr("time.sleep", partial(pytest.fail, "asked again"))
    with (
        failing_proxy(served.port, lambda _: False, seen=seen, denied=denied) as (proxy, _),
        use_endpoint(proxy),
    ):
        if not key:
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
            open_storage.cache_clear()
        if verb == "repair" and denied:  # whole: nothing is to be written
            call(verb, *arguments)
            return
        with pytest.raises(DataError, match=rf"s3://{bucket}/.*(check|no dataset)") as raised:
            call(verb, *arguments)
    assert "\n" not in str(raised.value)
    assert len(seen) <= 6, seen
