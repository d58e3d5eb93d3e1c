"""What each extra installs, and that making datasets needs nothing of training."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lapilli.data.errors import DataError
from lapilli.data.images.codecs import Codecs, available_codecs, resolve_resizer
from lapilli.data.images.node_codecs import choose_common
from lapilli.data.text.plain_tokenizer import read_plain_tokenizer
from lapilli.data.text.tokenizer import tokenizer_facts
from lapilli.data.text.tokenizer_files import load_tokenizer
from pipelines.cli.command import EXTRAS, missing_extra
from tests.factories import build_config, make_mixture, make_tokenizer
from tests.without_packages import TRAINING, hiding

ROOT = Path(__file__).parents[2]


def packages(extra: str) -> set[str]:
    """All that an extra names, the extras that it takes in included; "" is the base install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    found: set[str] = set()
    for wanted in map(Requirement, lines):
        if wanted.name == "lapilli":
            found.update(*map(packages, wanted.extras))
        else:
            found.add(canonicalize_name(wanted.name))
    return found


def test_a_node_that_makes_datasets_installs_nothing_of_training() -> None:
    assert packages("") & {*TRAINING, "ray"} == set()
    assert packages("data") == {"obstore", "ray"}


def test_the_gaudi_line_leaves_torch_and_deepspeed_to_its_image() -> None:
    assert packages("train") - packages("gaudi") == {"torch", "deepspeed"}
    assert {"torch", "deepspeed"} <= packages("train") <= packages("all") <= packages("dev")


def test_every_package_whose_absence_is_explained_is_in_the_extra_that_is_named() -> None:
    brings = {"accelerate": "peft"}  # which requires it
    for package, extra in EXTRAS.items():
        assert brings.get(package, package) in packages(extra)
        assert package not in packages("")


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process without the packages of training."""
    return hiding(tmp_path_factory.mktemp("hiding"))


VERBS = """
import json, sys
from pipelines.cli import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["lapilli", *arguments]
    try:
        main.main()
    except SystemExit as ended:
        print("ENDED", arguments[0], ended.code)
"""


def run(*commands: list[str], env: dict[str, str]) -> tuple[list[str], list[str], str]:
    """Run commands one after the other in a process; verb and exit code of each, errors, output."""
    command = [sys.executable, "-c", VERBS, json.dumps(commands)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=240)
    lines = done.stdout.splitlines()
    ends = [line.removeprefix("ENDED ") for line in lines if line.startswith("ENDED ")]
    return ends, done.stderr.splitlines(), done.stdout


def test_hidden_packages_are_not_found(hidden: dict[str, str]) -> None:
    probe = (
        "import importlib.util as u, json; print(json.dumps([u.find_spec(n) is None for n in %r]))"
    )
    output = subprocess.check_output([sys.executable, "-c", probe % (TRAINING,)], env=hidden)
    assert json.loads(output) == [True] * len(TRAINING)


def test_a_dataset_is_made_checked_verified_repaired_and_reported_without_training(
    hidden: dict[str, str], tmp_path: Path
) -> None:
    mixture = make_mixture(tmp_path / "raw", images=6, text_only=2)
    tokenizer = make_tokenizer(tmp_path / "tokenizer")
    output = tmp_path / "dataset"
    config: Any = asdict(build_config(mixture, output, tokenizer))
    for view in config["views"].values():
        view |= {"fill": "mean", "tower": "clip"}  # a number that is a tower's
    (tmp_path / "recipe.json").write_text(json.dumps(config))
    recipe = f"--config={tmp_path / 'recipe.json'}"
    ends, errors, said = run(["preprocess", recipe], env=hidden)
    assert (ends, errors) == (["preprocess 0"], [])
    assert "resizer pillow" in said
    assert (output / "report.html").is_file()
    (shard, *_) = sorted((output / "images").rglob("*.arrow"))
    before = shard.read_bytes()
    shard.write_bytes(before[:-8] + b"damaged!")
    looks = [[verb, str(output)] for verb in ("verify", "repair", "verify", "report", "show")]
    check = ["check", recipe, "--decode", f"--output={tmp_path / 'bad.parquet'}"]
    ends, errors, said = run(*looks, check, env=hidden)
    assert ends == ["verify 1", "repair 0", "verify 0", "report 0", "show 0", "check 0"], errors
    assert shard.read_bytes() == before
    assert "8 records: 8 good" in said


def test_a_verb_that_needs_torch_says_so_in_one_line(hidden: dict[str, str]) -> None:
    verbs = ["train", "estimate", "evaluate", "generate", "chat", "export", "replay", "quickstart"]
    ends, errors, _ = run(*([verb, "--help_all"] for verb in verbs), env=hidden)
    assert ends == [f"{verb} 2" for verb in verbs]
    assert errors == [f"error: {missing_extra(f'lapilli {verb}', 'torch')}" for verb in verbs]
    assert "pip install 'lapilli[train]'" in errors[0]


# ---- tokenizers without transformers -----------------------------------------------------------


def test_a_tokenizer_read_without_transformers_is_the_one_transformers_reads(
    tmp_path: Path,
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    theirs, ours = load_tokenizer(folder), read_plain_tokenizer(folder)
    assert tokenizer_facts(ours) == tokenizer_facts(theirs)
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved)
    assert (
        tokenizer_facts(read_plain_tokenizer(saved)).fingerprint
        == tokenizer_facts(load_tokenizer(saved)).fingerprint
    )


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer_class": "LlamaTokenizer"}, "tokenizer_class is LlamaTokenizer"),
        ({"add_bos_token": True}, "sets add_bos_token"),
        ({"added_tokens_decoder": {}}, "sets added_tokens_decoder"),
        ({"eos_token": "red"}, "eos_token is no special token"),
    ],
)
def test_a_folder_that_transformers_may_read_differently_asks_for_it(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    folder = make_tokenizer(tmp_path / "tokenizer")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(DataError, match=why) as caught:
        read_plain_tokenizer(folder)
    assert "pip install 'lapilli[text]'" in str(caught.value)


# ---- the resizer that all nodes have -----------------------------------------------------------


def codecs(*resizers: Any, version: str = "1") -> Sequence[Codecs]:
    return [Codecs("decoder 1", resizer, version) for resizer in resizers]


def test_the_first_resizer_that_all_nodes_have_is_taken() -> None:
    assert choose_common({"a": codecs("torch", "pillow")}).resizer == "torch"
    mixed = {"a": codecs("torch", "pillow"), "b": codecs("pillow"), "c": codecs("torch", "pillow")}
    assert choose_common(mixed).resizer == "pillow"


def test_nodes_without_one_in_common_are_named() -> None:
    with pytest.raises(DataError, match=r"a: .*torch 1; b: .*torch 2"):
        choose_common({"a": codecs("torch"), "b": codecs("torch", version="2")})


def test_auto_takes_the_first_of_what_is_here() -> None:
    assert available_codecs()[0].resizer == resolve_resizer("auto")
