"""Cards of models and datasets in the hub's form: YAML in front, then what they were made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, cast

import yaml

from lapilli.data.io.access import exists, is_folder
from lapilli.data.io.atomic import write_text
from lapilli.data.io.whole_file import read_whole
from lapilli.data.shards.manifest import NAME as MANIFEST
from lapilli.data.shards.manifest import read_manifest
from lapilli.train.checkpoint.find import find_checkpoints
from lapilli.train.config import RunConfig
from lapilli.train.run_folder.settings import read_run_config
from pipelines.reports.describe import describe_dataset, describe_run

__all__ = ["CARD", "base_models", "dataset_card", "model_card", "write_dataset_card"]

CARD = "README.md"
WRITTEN = "<!-- Written by lapilli. Without this line the file is yours, and stays as it is. -->"
# What a card of a run says of it; speed and folders are the machine's affair.
FIGURES = ("state", "loss", "held-out loss", "parameters", "global batch", "optimizer", "samples")
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
LARGEST = "1M<n<10M"
PRIVATE = ("dataset", "output")  # settings that name places of one machine


def model_card(run: Path, name: str, *, library: str = "", relation: str, usage: str) -> str:
    """The card of an export.

    Args:
        run: The run's folder.
        name: Its title.
        library: What loads the export, by the hub's name; empty for none that the hub knows.
        relation: `finetune`, or `adapter`.
        usage: How it is loaded, as Markdown.
    """
    config = read_run_config(run)
    head: dict[str, Any] = {"library_name": library} if library else {}
    head["pipeline_tag"] = "image-text-to-text"
    if bases := base_models(config):
        head |= {"base_model": bases, "base_model_relation": relation}
    head["tags"] = ["lapilli", "llava", *(["lora"] if config.model.lora else [])]
    described = describe_run(run).facts
    facts = {what: described[what] for what in FIGURES if what in described}
    checkpoints = find_checkpoints(run, hashed=False)
    state = checkpoints[-1].state if checkpoints else None
    if state is not None:
        facts["checkpoint"] = (f"step {state.step:,}",)
        facts["versions"] = tuple(f"{n} {v}" for n, v in sorted(state.versions.items()))
    sections = [
        *_data(config, state.dataset if state else ""),
        "## Training", "", *_table(facts),
        "The settings of `lapilli train`:", "", "```yaml", _recipe(config), "```",
    ]  # fmt: skip
    return _card(head, name, usage, sections)


def dataset_card(dataset: Path) -> str:
    """The card of a dataset."""
    manifest = read_manifest(dataset)
    kept = manifest.counts["kept"]
    head = {
        "task_categories": ["image-text-to-text"],
        "size_categories": [next((s for most, s in SIZES.items() if kept < most), LARGEST)],
        "tags": ["lapilli", "llava"],
        "viewer": False,  # the hub shows none of Arrow files with pixels
    }
    described = describe_dataset(dataset)
    usage = (
        "Arrow shards of tokens and prepared images. `lapilli train --dataset` and\n"
        "`lapilli.data.open_dataset` read them; `lapilli verify` compares every byte with\n"
        "`manifest.json`."
    )
    facts = dict(described.facts)
    facts["fingerprint"] = (manifest.fingerprint,)
    rows = [
        f"| {_cell(one.name)} | {one.read:,} | {one.kept:,} | {one.quarantined:,} | "
        f"{_cell(', '.join(one.reasons))} |"
        for one in described.sources
    ]
    sections = [
        "## Sources", "", "| source | read | kept | quarantined | why |", "|---|---|---|---|---|",
        *rows, "", "Quarantined records are in `quarantine.parquet`, each with its reason.", "",
        "## Content", "", *_table(facts),
    ]  # fmt: skip
    return _card(head, dataset.absolute().name, usage, sections)


def write_dataset_card(dataset: Path) -> Path | None:
    """Write a dataset's card, unless its owner has written his own; the file, if it is written."""
    path = dataset / CARD
    if exists(path) and WRITTEN not in read_whole(path).decode(errors="replace"):
        return None
    write_text(path, dataset_card(dataset))
    return path


def _card(head: Mapping[str, Any], name: str, usage: str, sections: Sequence[str]) -> str:
    front = yaml.safe_dump(dict(head), sort_keys=False, allow_unicode=True).rstrip()
    licence = (
        "The licence is not known here: that of weights and data it was made of holds. Name it as\n"
        "`license:` in the first lines of this file."
    )
    lines = ["---", front, "---", WRITTEN, "", f"# {name}", "", usage, "", licence, "", *sections]
    return "\n".join(lines).rstrip() + "\n"


def base_models(config: RunConfig) -> list[str]:
    """The hub's names of what the model began with; a folder of this machine is none."""
    found = (config.model.language.pretrained, config.model.vision.pretrained)
    return [name for name in found if name.count("/") == 1 and not is_folder(Path(name))]


def _data(config: RunConfig, fingerprint: str) -> list[str]:
    """What it was trained on: the fingerprint, and the mixture where the dataset is still here."""
    dataset = Path(config.dataset)
    known = {"fingerprint": (fingerprint,)} if fingerprint else {}
    rows: list[str] = []
    if exists(dataset / MANIFEST):
        manifest = read_manifest(dataset)
        mixture = manifest.mixture if manifest.fingerprint == fingerprint else {}
        rows = [
            f"| {_cell(name)} | {facts['records']:,} | {facts['tokens']:,} | "
            f"{facts['share']:.1%} | {facts['epochs']:.2f} |"
            for name, facts in mixture.get("sources", {}).items()
        ]
    if rows:
        head = "| source | records of an epoch | text tokens | share | epochs |"
        rows = [head, "|---|---|---|---|---|", *rows, ""]
    return ["## Data", "", f"`{dataset.name}`, view `{config.view}`.", "", *rows, *_table(known)]


def _table(facts: Mapping[str, Sequence[str]]) -> list[str]:
    if not facts:
        return []
    rows = [f"| {_cell(name)} | {_cell('; '.join(lines))} |" for name, lines in facts.items()]
    return ["| | |", "|---|---|", *rows, ""]


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;")


def _recipe(config: RunConfig) -> str:
    values = {n: v for n, v in asdict(config).items() if n not in PRIVATE and v not in ("", None)}
    return yaml.safe_dump(_without_places(values), sort_keys=False, allow_unicode=True).rstrip()


def _without_places(value: Any) -> Any:
    """Settings with the last name alone of each path; a host's folders are nobody's affair."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {name: _without_places(one) for name, one in fields.items()}
    if isinstance(value, (list, tuple)):
        return [_without_places(one) for one in cast("Sequence[Any]", value)]
    is_place = isinstance(value, str) and (value.startswith(("/", "./", "../", "~")) or
                                           "://" in value)  # fmt: skip
    return PurePosixPath(value).name if is_place else value
