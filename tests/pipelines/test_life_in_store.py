"""A whole life in a bucket: every setting that may be an address is given one of a real S3 server.

The working folder stays empty, and what is computed is what folders give.
"""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipelines.chat
import pipelines.preprocess
import pipelines.serve
from lapilli.data.building.runners import run_here
from lapilli.train.config import CheckpointConfig
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.run_folder.settings import as_json
from tests.factories import make_mixture, make_tokenizer
from tests.object_store import failing_proxy, serve, use_endpoint
from tests.pipelines.builds import RECIPE
from tests.pipelines.store_commands import ACCEPTED
from tests.train.small_run import small_run


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder behind `s3://bucket`: raw data, a language model with its tokenizer, questions."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "store" / "bucket"
    make_mixture(folder / "raw", images=16, text_only=8)
    make_tokenizer(folder / "llm")
    torch.manual_seed(0)
    shape: Any = {
        "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 512,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(folder / "llm")
    rows = [{"question_id": "1", "text": "What is it?", "answer": "red"}]
    for name in ("questions", "truth"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answer = {"question_id": "1", "prompt": "What is it?", "text": "red", "expected": "red"}
    (folder / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    for name in ("scratch", "cache", "empty", "local"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("LAPILLI_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("LAPILLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path / "empty")
    with (
        serve(tmp_path / "store", remembers="1h") as server,
        failing_proxy(server, lambda number: False) as (port, _),
        use_endpoint(port),
    ):
        yield folder


def recipes(folder: Path) -> dict[str, str]:
    """Paths that stand for the words of the commands."""
    config = small_run(
        Path("d"), Path("o"), num_workers=1, launcher="process", epochs=1,
        checkpoint=CheckpointConfig(every=2),
    )  # fmt: skip
    config.model.language.settings.clear()
    config = replace(config, model=replace(config.model, trainable=("projector",)))
    settings = {
        name: value for name, value in as_json(asdict(config)).items()
        if name not in ("dataset", "output")
    }  # fmt: skip
    settings["model"] = {k: v for k, v in settings["model"].items() if v is not None}
    (folder / "train.yaml").write_text(yaml.safe_dump(settings))
    (folder / "data.yaml").write_text(RECIPE)
    return {
        "RECIPE": str(folder / "data.yaml"), "TRAIN": str(folder / "train.yaml"),
        "LOCAL": str(folder),
    }  # fmt: skip


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_every_place_is_given_an_address(
    bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = recipes(tmp_path / "local")
    served = list[str]()
    for module in (pipelines.serve, pipelines.chat):
        monkeypatch.setattr(module, "serve", lambda config: served.append(config.model))
    # A Ray that another test has started does not know this store.
    monkeypatch.setattr(
        pipelines.preprocess,
        "run_on_ray",
        lambda tasks, output, workers, **_: run_here(tasks, output, workers),
    )
    done = list[list[str]]()
    for (verb, _), arguments in ACCEPTED.items():
        if [verb, *arguments] in done:
            continue
        done.append([verb, *arguments])
        given = list(arguments)
        for word, path in words.items():
            given = [one.replace(word, path) for one in given]
        main = importlib.import_module(f"pipelines.{verb}").main
        assert main(given) == 0, verb
        assert [*(tmp_path / "empty").iterdir()] == [], verb
    assert all((Path(path) / "checkpoints").is_dir() for path in served)
    assert len(served) == 2
    # what was made is in the bucket, and only there
    assert (bucket / "exports" / "two" / "config.json").is_file()
    assert (bucket / "exports" / "llava" / "config.json").is_file()
    config = json.loads((bucket / "runs" / "two" / "config.json").read_text())
    assert config["init_from"] == "s3://bucket/runs/one"
    assert config["model"]["language"]["pretrained"] == "s3://bucket/llm"
    # from folders, with the same bytes, the losses are the same
    shutil.copytree(bucket, tmp_path / "local" / "bucket")
    given = [
        one.replace("s3://bucket/runs/two", f"{tmp_path}/local/again")
        .replace("s3://bucket", f"{tmp_path}/local/bucket")
        .replace("TRAIN", words["TRAIN"])
        for one in ACCEPTED["train", "init_from"]
    ]
    assert importlib.import_module("pipelines.train").main(given) == 0
    again = [row.loss for row in read_metrics(tmp_path / "local" / "again")]
    assert [row.loss for row in read_metrics(bucket / "runs" / "two")] == again
    # another machine: nothing is here, and one flag is changed in a store's checkpoint
    shutil.rmtree(tmp_path / "cache")
    shutil.rmtree(tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    assert importlib.import_module("pipelines.show").main(["s3://bucket/runs/two"]) == 0
