"""An epoch of LLaVA's 665K with rows of several samples: what trees and packs save, as plans alone.

How many records lie on the images of each set is as LLaVA's authors count them
(github.com/haotian-liu/LLaVA/issues/657 and 702): 364,100 on COCO's 118,287 images of train2017,
86,417 of Visual Genome and 72,140 of GQA, 80,000 and 21,953 on images of their own, 40,688 without.
On COCO's the records are spread evenly at random; GQA's and Visual Genome's count as other images,
though many are the same. Lengths are those of topic `plan`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapilli.data.batches.micro_batches import longest_rows
from lapilli.data.batches.sampler import plan_epoch
from lapilli.data.batches.tree_plan import TreeLimits, TreePlan, micro_sums, plan_trees
from pipelines.benchmarks.harness import add_row, provenance, table
from pipelines.benchmarks.planning import IMAGE_TOKENS, TEMPLATE_TOKENS, drawn
from pipelines.cli.command import parse, say

__all__ = ["ShareConfig", "main", "made_samples"]

COCO_RECORDS, COCO_IMAGES, TOTAL = 364_100, 118_287, 665_298
WAYS = {
    "one sample a row": (False, False),
    "share_images": (True, False),
    "pack": (False, True),
    "share_images, pack": (True, True),
}


@dataclass(frozen=True)
class ShareConfig:
    """What is planned.

    Attributes:
        samples: Samples of the epoch, in the mixture's proportions.
        global_batch_size: Samples of a step.
        micro_batch_size: Rows of a micro-batch.
        row_length: Tokens of a row that holds several samples.
        max_branches: Most samples of a tree.
        save: Add rows to `results/share.csv`.
    """

    samples: int = TOTAL
    global_batch_size: int = 128
    micro_batch_size: int = 16
    row_length: int = 2048
    max_branches: int = 8
    save: bool = True


@dataclass(frozen=True, eq=False)
class MadeSamples:
    """Samples as a plan wants them: tokens, whether with an image, groups, shared tokens."""

    lengths: NDArray[np.int64]
    has_image: NDArray[np.bool_]
    groups: NDArray[np.int64]
    prefixes: NDArray[np.int64]


def main(argv: Sequence[str]) -> int:
    """Plan in each way, tell, and add a row for each."""
    config = parse(ShareConfig, argv, "What trees and packs save in an epoch of 665K records.")
    head = provenance(("numpy",), "share", argv)
    samples = made_samples(config.samples)
    rows = [_planned(way, config, samples) for way in WAYS]
    first = rows[0]
    shown = [
        [
            row["way"], f"{row['rows'] / 1e3:.0f}", f"{row['tower_passes'] / 1e3:.0f}",
            f"{row['tokens'] / 1e6:.0f}", f"{row['computed'] / 1e6:.0f}",
            f"{row['seconds']:.1f}", f"{row['tower_passes'] / first['tower_passes']:.3f}",
            f"{row['computed'] / first['computed']:.3f}",
        ]
        for row in rows
    ]  # fmt: skip
    columns = ("way", "rows k", "images k", "tokens M", "computed M", "s", "images", "computed")
    table(f"{config.samples:,} samples", columns, shown)
    say("images, computed: tower passes and tokens with padding, of those with one sample a row")
    if config.save:
        for row in rows:
            add_row("share", head | row)
    return 0


def made_samples(count: int) -> MadeSamples:
    """Records in the published proportions, drawn from a fixed seed."""
    drawn_ones = drawn(count)
    lengths = np.minimum(drawn_ones.tokens, 2048)
    with_image = np.flatnonzero(drawn_ones.has_image)
    on_coco = with_image[: count * COCO_RECORDS // TOTAL]
    images = max(1, count * COCO_IMAGES // TOTAL)
    groups = np.arange(count) + images
    groups[on_coco] = np.random.default_rng(1).integers(0, images, len(on_coco))
    prefix = IMAGE_TOKENS + TEMPLATE_TOKENS - 5  # what stands behind the image is each record's own
    prefixes = np.zeros(count, np.int64)
    prefixes[on_coco] = prefix
    lengths = np.maximum(lengths, prefixes + 1)  # something follows the image
    return MadeSamples(lengths, drawn_ones.has_image, groups, prefixes)


def _planned(way: str, config: ShareConfig, samples: MadeSamples) -> dict[str, Any]:
    share, pack = WAYS[way]
    started = time.process_time()
    lengths, images = samples.lengths, samples.has_image
    if share or pack:
        plan = plan_trees(
            lengths, images, samples.groups, samples.prefixes,
            TreeLimits(share, pack, config.row_length, config.max_branches),
            global_batch_size=config.global_batch_size, seed=0, epoch=0,
        )  # fmt: skip
        rows, tokens = len(plan.rows) - 1, int(plan.row_lengths.sum())
        passes = _tower_passes(plan, images)
        computed = _computed(plan, config)
    else:
        order = plan_epoch(
            lengths, images, global_batch_size=config.global_batch_size, seed=0, epoch=0,
            sampler="grouped",
        )  # fmt: skip
        rows, tokens, passes = len(lengths), int(lengths.sum()), int(images.sum())
        longest = longest_rows(order, lengths, images, micro_batch_size=config.micro_batch_size)
        computed = int(np.concatenate(longest).sum()) * config.micro_batch_size
    return {
        "way": way, "samples": len(lengths), "row_length": config.row_length,
        "max_branches": config.max_branches, "rows": rows, "tower_passes": passes,
        "tokens": tokens, "computed": computed,
        "padded_percent": round(100 * (1 - tokens / computed), 2),
        "seconds": round(time.process_time() - started, 2),
    }  # fmt: skip


def _tower_passes(plan: TreePlan, has_image: NDArray[np.bool_]) -> int:
    """Images that the tower encodes: one a tree."""
    return int(has_image[plan.order[plan.trees[:-1]]].sum())


def _computed(plan: TreePlan, config: ShareConfig) -> int:
    """Tokens with padding: rows of a micro-batch are as long as its longest, packed ones as all."""
    if (len(plan.trees) - 1) > (len(plan.rows) - 1):
        return (len(plan.rows) - 1) * config.row_length
    size = config.micro_batch_size
    return int(micro_sums(plan, micro_batch_size=size).longest.sum()) * size
