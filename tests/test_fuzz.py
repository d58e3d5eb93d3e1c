"""Damaged files of every kind: errors of the package's own, an end, and bounded memory.

`LAPILLI_FUZZ_SECONDS` says how long the long test takes, 600 by default.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.sources import SOURCES
from lapilli.data.sources.validation import read_entries
from pipelines.cli.question_file import read_questions
from tests.conftest import ROOT
from tests.fuzzing import OWN

SECONDS = float(os.environ.get("LAPILLI_FUZZ_SECONDS", "600"))
# Formats that are JSON, an element a record.
READABLE = sorted(set(SOURCES) - {"webdataset", "parquet", "basic_vlm", "csv", "text_files"})
FIELDS = st.sampled_from(
    ["id", "image", "images", "conversations", "messages", "texts", "from", "value", "role",
     "content", "user", "assistant", "system", "weight", "image_id", "caption", "type", "text",
     "image_url", "question_id", "reasoning_content", "label", "bytes", "path"]
)  # fmt: skip
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["human", "gpt", "user", "assistant", "\ud800", "\0", "<image>", "../a", "a/" * 3000]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=20,
)
SETTINGS = settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def fuzz(folder: Path, *arguments: str) -> None:
    """Run the fuzzer in a process of its own, and say what it found."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzzing", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    faults = [
        f"{line['file']} ({line['kept']}): {line['fault']}" for line in lines if "fault" in line
    ]
    assert not faults, "\n".join(faults)
    assert done.returncode == 0, f"{done.returncode}, at {folder / 'case'}: {done.stderr[-3000:]}"
    assert lines[-1]["cases"] > 0


def test_a_few_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, "--cases=220", "--seed=3")


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS + 600)
def test_damaged_files(tmp_path: Path) -> None:
    fuzz(tmp_path, f"--seconds={SECONDS * 0.7}", "--seed=11")


@pytest.mark.long
@pytest.mark.timeout(2 * SECONDS + 600)
def test_damaged_files_of_a_dataset(tmp_path: Path) -> None:
    fuzz(tmp_path, f"--seconds={SECONDS * 0.3}", "--seed=12", f"--only={OWN}")


def one_line(error: DataError) -> None:
    assert "\n" not in str(error)
    assert len(str(error)) < 2000


def read_all(folder: Path, format_name: str, elements: Any) -> None:
    (folder / "a.json").write_text(json.dumps(elements))
    try:
        entries = [*read_entries(SourceConfig("s", "a.json", format=format_name), folder)]
    except DataError as error:
        one_line(error)
        return
    assert len(entries) >= len(elements) or format_name == "ai_challenger"
    for entry in entries:
        entry.pack()


@settings(SETTINGS, max_examples=60)
@given(elements=st.lists(VALUES, max_size=4), format_name=st.sampled_from(READABLE))
def test_any_json_is_records_or_verdicts(
    tmp_path: Path, elements: list[Any], format_name: str
) -> None:
    read_all(tmp_path, format_name, elements)


@settings(SETTINGS, max_examples=50)
@given(lines=st.lists(VALUES, max_size=3))
def test_any_json_is_questions_or_one_line(tmp_path: Path, lines: list[Any]) -> None:
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    try:
        read_questions(tmp_path / "q.jsonl", tmp_path)
    except DataError as error:
        one_line(error)


@pytest.mark.long
@settings(SETTINGS, max_examples=20_000)
@given(elements=st.lists(VALUES, max_size=6), format_name=st.sampled_from(READABLE))
def test_much_json_is_records_or_verdicts(
    tmp_path: Path, elements: list[Any], format_name: str
) -> None:
    read_all(tmp_path, format_name, elements)
