"""What leaves the machine: pages and exports without folders, machines' names and secrets."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelines.export
import pipelines.report
import pipelines.show
from lapilli.data.io.printable import relative_names
from lapilli.data.text.token_text import Piece
from lapilli.train.run_folder.messages import note
from lapilli.train.run_folder.names import CONFIG, WORKERS
from pipelines.reports.page import Figure, GalleryItem, Page
from pipelines.reports.run_report import write_run_report
from pipelines.train import train
from tests.browser import FLAGS, Chromium, find_chromium
from tests.train.small_run import small_dataset, small_run

SECRET = "hunter2hunter2"
HOST = "worker-17.cluster.example"
EVIL = "</p><img src=x onerror='window.pwned=1'><script>pwned=1</script>\"><svg onload=pwned=1>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a run on it and an export, made with secrets in the environment."""
    found = tmp_path_factory.mktemp("private")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN", "MY_PASSWORD"):
            patch.setenv(name, SECRET)
        dataset = small_dataset(found, images=8, text_only=4)
        run = found / "run"
        train(small_run(dataset, run, launcher="process", num_workers=1, epochs=1, max_steps=2))
        pipelines.report.main([str(dataset)])
        pipelines.show.main([str(run), str(dataset), f"--html={found / 'page.html'}"])
        pipelines.export.main([str(run), "--to=hf", f"--output={found / 'export'}"])
    return found


def test_pages_and_exports_name_no_folder_and_no_machine(folder: Path) -> None:
    pages = [folder / "page.html", folder / "run/report.html", folder / "dataset/report.html"]
    for path in (*pages, *(path for path in (folder / "export").rglob("*") if path.is_file())):
        data = path.read_bytes()
        assert str(folder).encode() not in data, path
        assert str(Path.home()).encode() + b"/" not in data, path
    text = pages[1].read_text(encoding="utf-8")
    assert "<title>Run run" in text


def test_no_secret_of_the_environment_is_in_any_file(folder: Path) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_a_report_names_ranks_and_not_machines(folder: Path) -> None:
    run = folder / "run"
    workers = json.loads((run / WORKERS).read_text())
    assert workers["workers"][0]["host"] == platform.node()  # it stays in the run's folder
    workers["workers"].append({**workers["workers"][0], "host": HOST, "rank": 3})
    (run / WORKERS).write_text(json.dumps(workers))
    note(run, f"rank 3 on {HOST} is slow: {run / CONFIG}")
    text = write_run_report(run).read_text(encoding="utf-8")
    assert "rank 3 on rank 3&#39;s machine is slow: config.json" in text
    assert HOST not in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/data/set", "set"),
        ("/home/my data/set of mine", "set of mine"),
        ("cannot read /home/me/x.json: gone", "cannot read x.json: gone"),
        ("'/a/b', \"/c/d/\" (/e/f) [/g/h]", "'b', \"d\" (f) [h]"),
        ("s3://bucket/a/b and https://h/a/b", "s3://bucket/a/b and https://h/a/b"),
        (
            "images/0.jpg, ../a/b, ~/a/b, and/or, 1/2/3",
            "images/0.jpg, ../a/b, ~/a/b, and/or, 1/2/3",
        ),
        ("/", "/"),
    ],
)
def test_absolute_paths_are_shown_by_their_name(text: str, shown: str) -> None:
    assert relative_names(text) == shown


@given(st.lists(st.from_regex(r"[A-Za-z0-9_.-]+", fullmatch=True), min_size=3))
def test_no_folder_above_a_file_is_told(names: list[str]) -> None:
    path = "/" + "/".join(names)
    assert relative_names(f"see {path}, please") == f"see {names[-1]}, please"


@pytest.mark.parametrize("make", [str, lambda text: f"run {text}"], ids=["alone", "in a text"])
def test_names_of_strangers_are_text_in_a_browser(
    chromium: Chromium, tmp_path: Path, make: Callable[[str], str]
) -> None:
    del chromium  # is skipped where there is none
    from playwright.sync_api import sync_playwright

    evil, picture = make(EVIL), np.zeros((8, 8, 3), np.uint8)
    page = Page(evil, evil).section(evil).text(evil).code(evil).figures([Figure(evil, evil, evil)])
    page.key_values({evil: evil}).table([evil], [[evil]], evil)
    page.transcript([Piece(evil, "text", True, (1,))], evil).gallery([GalleryItem(picture, [evil])])
    page.line_chart({evil: ([0, 1], [0, 1])}, evil, evil, evil).bar_chart([evil], {evil: [1]}, evil)
    path = page.write(tmp_path / "page.html")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        tab = browser.new_page()
        tab.goto(path.as_uri())
        assert tab.evaluate("window.pwned") is None
        assert tab.evaluate("document.querySelectorAll('script, [onerror], [onload]').length") == 0
        assert EVIL in (tab.text_content("body") or "")
        browser.close()
