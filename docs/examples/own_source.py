"""Read a format of your own: labels in file names, `photos/red_mug_017.jpg`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from lapilli.data import (
    BuildConfig,
    ImagePart,
    ImageSpec,
    Reason,
    Source,
    SourceConfig,
    TextPart,
    Turn,
    Verdict,
    build,
    open_dataset,
    plan_build,
    run_here,
    train_tokenizer,
)


def read(source: SourceConfig, root: Path) -> Iterator[dict[str, Any]]:
    """One element per photo; `id` names the record in every report."""
    for pattern in source.patterns:
        for path in sorted(root.glob(pattern)):
            yield {"id": path.stem, "file": path.relative_to(root).as_posix()}


def turns(element: dict[str, Any]) -> tuple[tuple[Turn, ...], tuple[str, ...]] | Verdict:
    """The conversation and the images of an element, or why there is none."""
    colour, _, rest = element["id"].partition("_")
    if not rest:
        return Verdict(Reason.SCHEMA, f"{element['file']}: no label; expected COLOUR_THING_NUMBER")
    question = Turn("user", (ImagePart(0), TextPart("\nWhat colour is it?")))
    return (question, Turn("assistant", (TextPart(colour),))), (element["file"],)


LABELS = Source(read, turns)  # in a recipe: `format: own_source:LABELS`

if __name__ == "__main__":
    Path("photos").mkdir()
    for name, colour in (("red_mug_1", "red"), ("blue_mug_2", "blue"), ("unlabelled", "grey")):
        Image.new("RGB", (40, 30), colour).save(f"photos/{name}.jpg")
    train_tokenizer(["What colour is it? red blue"], "tokenizer", vocab_size=300)
    config = BuildConfig(
        root=".",
        output="dataset",
        sources=[SourceConfig("labels", "photos/*.jpg", format="own_source:LABELS")],
        tokenizer="tokenizer",
        template="v1",
        views={"pad32": ImageSpec(32, (122, 116, 104))},
        max_quarantined=0.5,
    )
    report = build(plan_build(config), runner=run_here)
    print(report.manifest.counts["reasons"])
    dataset = open_dataset("dataset", view="pad32", image_tokens=4)
    for sample in dataset:
        colour = sample.pixels[0, 16, 16].tolist()
        print(sample.sample_id, colour)
