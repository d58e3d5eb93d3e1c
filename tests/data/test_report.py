"""A dataset's report: its numbers are those of the material, and it is fit to be read."""

from __future__ import annotations

import html
import io
import json
import re
from base64 import b64decode
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from lapilli.data.config import BuildConfig
from lapilli.data.record import Reason
from pipelines.reports.dataset_report import REMEDIES, BuildTime, write_dataset_report
from tests.browser import Chromium
from tests.factories import (
    Mixture,
    build_config,
    build_dataset,
    image_bytes,
    make_mixture,
    make_tokenizer,
)

LATER = "0/0000_jpeg.jpeg"  # the image of a record that is quarantined, then whole again


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Mixture, BuildConfig]:
    folder = tmp_path_factory.mktemp("report")
    mixture = make_mixture(folder / "root", images=30, defects=True)
    (folder / "root" / "images" / LATER).write_bytes(b"cut")
    tokenizer = make_tokenizer(folder / "tokenizer")
    build_dataset(mixture, folder / "out", tokenizer)
    (folder / "root" / "images" / LATER).write_bytes(image_bytes("jpeg", 300, 200))
    return folder / "out", mixture, build_config(mixture, folder / "out", tokenizer)


@pytest.fixture(scope="module")
def page(made: tuple[Path, Mixture, BuildConfig]) -> str:
    path = write_dataset_report(made[0], made[2], time=BuildTime(12.5, 30, 0))
    assert path == made[0] / "report.html"
    return path.read_text(encoding="utf-8")


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>\s*(.*?)</tr>", page, re.DOTALL)
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
    return [[html.unescape(cell) for cell in row] for row in found]


def test_its_numbers_are_those_of_the_mixture(
    made: tuple[Path, Mixture, BuildConfig], page: str
) -> None:
    verdicts = Counter(str(r) for r in made[1].expected.values() if r is not None)
    verdicts[str(Reason.IMAGE_UNDECODABLE)] += 1
    rows = cells(page)
    for reason, count in verdicts.items():
        assert [reason, str(count), REMEDIES[reason]] in rows
    read = len(made[1].expected)
    kept = read - verdicts.total()
    assert f"<strong>{kept}</strong>" in page
    assert f"kept of {read} read" in page
    repairs = {row[0]: row[1] for row in rows if row and row[0] in ("alias", "case", "extension")}
    assert repairs == {"alias": "1", "case": "1", "extension": "1"}
    assert next(row for row in rows if row[0] == "made_up")[1:3] == [str(read), str(kept)]
    assert "12 s" in page


def test_every_reason_has_its_remedy() -> None:
    assert {str(reason) for reason in Reason} <= set(REMEDIES)


def test_a_quarantined_image_is_shown_where_it_decodes_and_its_error_elsewhere(page: str) -> None:
    found = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
    sizes = [Image.open(io.BytesIO(b64decode(data))).size for _, data in found]
    assert (160, 107) in sizes  # 300 x 200, which was damaged when the dataset was built
    crosses = [size for (kind, _), size in zip(found, sizes, strict=True) if kind == "png"]
    assert crosses.count((160, 160)) >= 8
    assert "images/bad/html.jpg: 54 bytes: this is a web page" in html.unescape(page)


def test_it_is_fit_to_be_read(
    made: tuple[Path, Mixture, BuildConfig], page: str, chromium: Chromium
) -> None:
    assert page
    assert chromium.problems(made[0] / "report.html") == []


def test_sources_that_are_gone_leave_frames(
    made: tuple[Path, Mixture, BuildConfig], tmp_path: Path
) -> None:
    config = replace(made[2], root=str(tmp_path / "gone"))
    text = write_dataset_report(made[0], config).read_text(encoding="utf-8")
    assert "image_undecodable" in text


def test_a_mixture_of_text_alone_has_a_report(tmp_path: Path) -> None:
    mixture = make_mixture(tmp_path / "root", images=0, text_only=5)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    build_dataset(mixture, tmp_path / "out", tokenizer)
    config = build_config(mixture, tmp_path / "out", tokenizer)
    text = write_dataset_report(tmp_path / "out", config).read_text(encoding="utf-8")
    assert "Every record read is kept." in text
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["images"] == 0
