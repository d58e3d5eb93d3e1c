"""Show datasets and runs as tables, with conversations and their trained tokens.

lapilli show DIR [DIR ...] [--samples N] [--tokens] [--html FILE]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jsonargparse import ArgumentParser
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lapilli.data.batches.tree_plan import TreePlan
from lapilli.data.dataset.dataset import Dataset, open_dataset
from lapilli.data.io.access import require_writable
from lapilli.data.io.printable import one_line, relative_names
from lapilli.data.shards.manifest import read_manifest
from lapilli.data.text.token_text import Piece
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.settings import read_run_config, read_run_info
from lapilli.train.steps.rows import EpochPlans
from pipelines.cli import command
from pipelines.cli.command import UsageError, read_arguments, run, say
from pipelines.cli.conversation import has_colour, print_transcript, read_transcript
from pipelines.cli.terminal import print_table
from pipelines.reports.compare import Compared, add_curves, compare_rows, differing, read_compared
from pipelines.reports.describe import Description, describe
from pipelines.reports.page import GalleryItem, Page
from pipelines.reports.ticks import counted

__all__ = ["ShowConfig", "ShownSample", "samples_of", "show", "side_by_side", "write_page"]

COLUMN = 24  # characters a column needs for its lines to be read
LONGEST_NAME = 18


@dataclass(frozen=True)
class ShowConfig:
    """What is shown; the meaning of each field is its flag's help."""

    folders: tuple[str, ...]
    samples: int
    tokens: bool
    view: str
    html: str


@dataclass(frozen=True)
class ShownSample:
    """One sample as a reader sees it.

    Attributes:
        title: Its name and lengths.
        pieces: Its conversation.
        pictures: uint8 [images, size, size, 3], what the tower sees.
        is_sample: False for what stands above samples: a row, what a tree's samples share.
    """

    title: str
    pieces: list[Piece]
    pictures: np.ndarray
    is_sample: bool = True


def read_config(argv: Sequence[str] | None) -> ShowConfig:
    """Read the arguments.

    Raises:
        UsageError: A flag that is unknown or has a wrong value.
    """
    parser = ArgumentParser(
        prog="lapilli show",
        description="Datasets and runs as tables, conversations with trained tokens marked.",
        exit_on_error=False,
    )
    parser.add_argument("folders", nargs="+", type=str, help="datasets and runs")
    parser.add_argument("--samples", type=int, help="conversations of each, from all over it")
    parser.add_argument(
        "--tokens", action="store_true", help="show each token of a conversation by itself"
    )
    parser.add_argument("--view", type=str, default="", help="a dataset's view; else its first")
    parser.add_argument("--html", type=str, default="", help="write all of it as one page, too")
    found = read_arguments(parser, argv, addresses=["folders"])
    samples = int(found.tokens) if found.samples is None else found.samples
    if samples < 0:
        raise UsageError(f"samples: {samples}; expected 0 or more")
    folders = tuple(found.folders)
    return ShowConfig(
        folders=folders, samples=samples, tokens=found.tokens, view=found.view, html=found.html
    )


def show(config: ShowConfig, console: Console) -> None:
    """Print the tables, then the conversations; write the page if one is asked for."""
    described = [describe(folder) for folder in config.folders]
    for kind in ("dataset", "run"):
        for group in _groups([d for d in described if d.kind == kind], console.width):
            print_table(side_by_side(group))
    compared = read_compared([d.path for d in described if d.kind == "run"])
    if len(compared) > 1:
        print_table(compared_table(compared))
    for description in described:
        if description.sources:
            print_table(sources_table(description, titled=len(described) > 1))
    names = ", ".join(relative_names(folder) for folder in config.folders)
    page = Page("lapilli show", names)
    for description in described:
        samples = samples_of(description, config) if config.samples else []
        _print_samples(description, samples, config, console)
        if config.html:
            add_to_page(page, description, samples, tokens=config.tokens)
    if config.html:
        if len(compared) > 1:
            add_curves(page, compared)
        write_page(page, config.html)


def _groups(described: Sequence[Description], width: int) -> Iterator[Sequence[Description]]:
    """As many columns at once as there is room for."""
    fit = max(1, (width - LONGEST_NAME) // COLUMN)
    for start in range(0, len(described), fit):
        yield described[start : start + fit]


def side_by_side(described: Sequence[Description]) -> Table:
    """A column for each folder, a row for each fact that any of them has."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, highlight=False)
    table.add_column(described[0].kind, style="cyan", overflow="fold")
    for description in described:
        table.add_column(escape(description.name), overflow="fold", min_width=COLUMN - 4)
    names = dict.fromkeys(name for description in described for name in description.facts)
    between = ", " if len(described) == 1 else "\n"
    for name in names:
        table.add_row(
            escape(name), *(escape(between.join(d.facts.get(name, "—"))) for d in described)
        )
    return table


def compared_table(runs: Sequence[Compared]) -> Table:
    """What runs differ in, and their losses after as many steps and as many tokens."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, highlight=False)
    table.add_column("compared", style="cyan", overflow="fold")
    losses = compare_rows(runs)
    for number, run_shown in enumerate(runs):
        least = max((len(values[number]) for values in losses.values()), default=0)
        table.add_column(escape(str(run_shown.path)), overflow="fold", min_width=max(10, least))
    for name, values in {**differing(runs), **losses}.items():
        table.add_row(escape(name), *map(escape, values))
    return table


def sources_table(description: Description, *, titled: bool) -> Table:
    """A dataset's sources with what was quarantined and why."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, highlight=False)
    table.title = escape(str(description.path)) if titled else None
    table.add_column("source", style="cyan", overflow="fold")
    for name in ("read", "kept", "quarantined"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for row in description.sources:
        numbers = (f"{number:,}" for number in (row.read, row.kept, row.quarantined))
        table.add_row(escape(row.name), *numbers, ", ".join(row.reasons) or "—")
    return table


# ---- samples -----------------------------------------------------------------------------------


def samples_of(description: Description, config: ShowConfig) -> list[ShownSample]:
    """Samples from all over a dataset, or over a run's dataset as its model sees it.

    Raises:
        DataError, TrainError: The dataset cannot be opened.
    """
    if description.kind == "run":
        dataset, image_text = _open_run(description.path)
        if (run_config := read_run_config(description.path)).shares_rows:
            plan = EpochPlans(dataset, run_config).first
            assert isinstance(plan, TreePlan)
            return _drawn_rows(dataset, plan, config.samples, image_text)
    else:
        view = config.view or next(iter(read_manifest(description.path).views))
        place = description.address or description.path
        dataset = open_dataset(place, view=view, image_tokens=1)
        image_text = f"<image {dataset.image_size} px>"  # how many tokens is the tower's affair
    places = np.linspace(0, len(dataset) - 1, min(config.samples, len(dataset)))
    return [_sample(dataset, int(place), image_text) for place in np.unique(places.astype(int))]


def _open_run(run_folder: Path) -> tuple[Dataset, str]:
    config, found = read_run_config(run_folder), read_run_info(run_folder)
    if found is None:
        raise TrainError(
            f"{run_folder}: does not say how many tokens an image takes (no facts.json); "
            f"show its dataset instead: {config.dataset}"
        )
    dataset = open_dataset(
        config.dataset,
        view=config.view,
        image_tokens=found.image_tokens,
        max_length=config.max_length,
    )
    return dataset, f"<image {found.image_tokens} tokens>"


def _drawn_rows(dataset: Dataset, plan: TreePlan, count: int, image_text: str) -> list[ShownSample]:
    """Rows from all over an epoch: of each tree what its samples share, then each one's own."""
    numbers = np.linspace(0, len(plan.rows) - 2, min(count, len(plan.rows) - 1))
    shown: list[ShownSample] = []
    for number in np.unique(numbers.astype(int)).tolist():
        trees = plan.row(number)
        title = (
            f"row of {int(plan.row_lengths[number]):,} tokens: {counted(len(trees), 'tree')}, "
            f"{counted(sum(map(len, trees)), 'sample')}"
        )
        shown.append(ShownSample(title, [], np.zeros((0, 1, 1, 3), np.uint8), False))
        for tree in trees:
            shown += _drawn_tree([_sample(dataset, int(one), image_text) for one in tree])
    return shown


def _drawn_tree(samples: Sequence[ShownSample]) -> list[ShownSample]:
    """Samples of a tree, the first with what all of them share above it."""
    first = samples[0]
    if len(samples) == 1:
        return [replace(first, title=f"└─ {first.title}")]
    images = [place for place, piece in enumerate(first.pieces) if piece.kind == "image"]
    shared = images[-1] + 1
    tokens = sum(len(piece.ids) for piece in first.pieces[:shared] if piece.kind != "image")
    title = f"└─ shared by {len(samples)}: {tokens} text tokens, {counted(len(images), 'image')}"
    drawn = [ShownSample(title, first.pieces[:shared], first.pictures, False)]
    for number, one in enumerate(samples, start=1):
        arm = "└─" if number == len(samples) else "├─"
        drawn.append(ShownSample(f"   {arm} {one.title}", one.pieces[shared:], one.pictures[:0]))
    return drawn


def _sample(dataset: Dataset, index: int, image_text: str) -> ShownSample:
    sample = dataset.sample(index)
    pieces = read_transcript(dataset, index, image_text=image_text)
    text = sum(piece.kind != "image" for piece in pieces for _ in piece.ids)
    trained = int(dataset.num_trained[index])
    title = (
        f"{sample.sample_id}: {text} text tokens, {trained} trained ({trained / text:.0%}), "
        f"{len(sample.pixels)} image{'' if len(sample.pixels) == 1 else 's'}"
    )
    return ShownSample(title, pieces, sample.pixels)


def _print_samples(
    description: Description,
    samples: Sequence[ShownSample],
    config: ShowConfig,
    console: Console,
) -> None:
    if not samples:
        return
    count = sum(shown.is_sample for shown in samples)
    how = "in green" if has_colour(console) else "in [[double brackets]]"
    title = f"{description.path}: {counted(count, 'conversation')}, what is trained {how}"
    console.print(escape(one_line(title)), style="bold", highlight=False, soft_wrap=True)
    for shown in samples:
        console.print()
        console.print(escape(one_line(shown.title)), style="dim", highlight=False, soft_wrap=True)
        if shown.pieces:
            print_transcript(shown.pieces, tokens=config.tokens, console=console)


# ---- the page ----------------------------------------------------------------------------------


def add_to_page(
    page: Page, description: Description, samples: Sequence[ShownSample], *, tokens: bool
) -> None:
    """A section for a folder: its facts, its sources, its samples with their pictures."""
    page.section(f"{description.kind} {description.path}")
    page.key_values({name: ", ".join(lines) for name, lines in description.facts.items()})
    if description.sources:
        columns = ["source", "read", "kept", "quarantined", "why"]
        rows = [
            [s.name, s.read, s.kept, s.quarantined, ", ".join(s.reasons)]
            for s in description.sources
        ]
        page.table(columns, rows)
    if samples:
        page.text("What the loss counts is marked in green.")
    for shown in samples:
        if len(shown.pictures):
            page.gallery([GalleryItem(picture) for picture in shown.pictures])
        page.transcript(shown.pieces, shown.title, tokens=tokens)


def write_page(page: Page, path: str) -> None:
    """Write the page and say so.

    Raises:
        DataError: The file cannot be written.
    """
    page.write(path)
    say(f"\npage: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = read_config(argv)
    if config.html:
        require_writable("html", Path(config.html).parent)
    show(config, command.console)
    return 0


if __name__ == "__main__":
    run(main)
