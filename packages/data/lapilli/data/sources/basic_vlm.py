"""Basic-VLM's pair of files: `image_map` {name: {image_file, ID, path}}, `captions` {ID: {q, a}}.

Each answer of each entry is an element, so nothing of the pair is left out. Its preparation gives
one ID to several images where its offsets overlap: which of them the answers belong to is lost, so
such an image is an element with a defect; so are an image without captions and captions without an
image. `annotations` names the two files in this order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.sources.captions import choose, left_over
from lapilli.data.sources.reading.bounds import Bounds, Unreadable
from lapilli.data.sources.reading.files import annotation_places
from lapilli.data.sources.reading.json_stream import read_items
from lapilli.data.sources.turns import IMAGE_MARKER

__all__ = ["read"]

MARKER = "<|extra_0|>"  # a spare token of Qwen's, where the original puts the image
IMAGE_MAP = frozenset({"image_file", "iamge_file", "ID", "path"})
CAPTION = frozenset({"q", "a"})
ANSWER = frozenset({"value", "from"})
FILE_NAMES = ("image_file", "iamge_file")  # the second is how its own files spell it


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """An element an answer, in the order of the image map, then captions of no image.

    Raises:
        DataError: Not two files, or one that is missing or no JSON object.
    """
    files = annotation_places(config, root)
    if len(files) != 2:
        raise DataError(
            f"annotations: source {config.name} has {len(files)} files; format basic_vlm expects "
            "two, [image_map.json, captions.json]"
        )
    bounds = Bounds.of(config)
    images: list[tuple[str, Any]] = []
    users: defaultdict[str, list[str]] = defaultdict(list)
    for name, entry in read_items(files[0], bounds):
        if isinstance(entry, Unreadable):
            yield entry
            continue
        images.append((name, entry))
        users[_id(entry)].append(_path(entry) or name)
    captions: defaultdict[str, list[Any]] = defaultdict(list)
    for found, entry in read_items(files[1], bounds):
        if isinstance(entry, Unreadable):
            yield entry
        else:
            captions[found].append(entry)
    for name, entry in images:
        found = _id(entry)
        yield from _elements(name, entry, users[found], captions.get(found, []), config)
    for found, entries in captions.items():
        if found not in users:
            for entry in entries:
                yield {"id": found, "captions": entry, "defect": f"no image has the ID {found}"}


def _elements(
    name: str, entry: Any, users: list[str], captions: list[Any], config: SourceConfig
) -> Iterator[dict[str, Any]]:
    found, path = _id(entry), _path(entry)
    whole = {"id": found, "image_map": {name: entry}, "captions": captions}
    if path is None:
        yield whole | {"defect": f"image map entry of {name!r}: expected image_file and ID"}
    elif len(set(users)) > 1:
        others = ", ".join(sorted(set(users))[:3])
        yield whole | {
            "defect": f"ID {found} is given to {len(set(users))} images ({others}); which of them "
            "its answers belong to is not known; read the files it was made of instead"
        }
    elif not captions:
        yield whole | {"defect": f"no captions under ID {found}"}
    else:
        for caption in captions:
            yield from _answers(found, path, entry, caption, config)


def _answers(
    found: str, image: str, entry: Any, caption: Any, config: SourceConfig
) -> Iterator[dict[str, Any]]:
    """The questions with an answer of one entry of `captions`."""
    fields = cast("dict[str, Any]", caption) if isinstance(caption, dict) else {}
    question, given = fields.get("q"), fields.get("a")
    answers = cast("list[Any]", given) if isinstance(given, list) and given else [given]
    text = question.replace(MARKER, IMAGE_MARKER) if isinstance(question, str) else question
    read = [(entry, IMAGE_MAP), (caption, CAPTION)]
    for answer in choose(answers, config, image):
        more = [(answer, ANSWER)] if isinstance(answer, dict) else []
        others = left_over(_joined([*read, *more]), frozenset())
        if isinstance(answer, dict):
            answer = cast("dict[str, Any]", answer).get("value")
        yield {"id": found, "image": image, "question": text, "answer": answer, **others}


def _joined(objects: list[tuple[Any, frozenset[str]]]) -> dict[str, Any]:
    """All fields of several objects but those that are read."""
    joined: dict[str, Any] = {}
    for value, read in objects:
        fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
        joined |= {name: inner for name, inner in fields.items() if name not in read}
    return joined


def _id(entry: Any) -> str:
    fields = cast("Mapping[str, Any]", entry) if isinstance(entry, dict) else {}
    return str(fields.get("ID"))


def _path(entry: Any) -> str | None:
    """The path of an entry's image, or None where it has none."""
    fields = cast("Mapping[str, Any]", entry) if isinstance(entry, dict) else {}
    name = next((fields[key] for key in FILE_NAMES if isinstance(fields.get(key), str)), None)
    folder = fields.get("path", "")
    if name is None or "ID" not in fields or not isinstance(folder, str):
        return None
    return f"{folder.rstrip('/')}/{name}" if folder else name
