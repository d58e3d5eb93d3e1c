"""Images with a text file beside each: `photo.jpg` and its caption in `photo.txt`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lapilli.data.config import SourceConfig
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_denied
from lapilli.data.mounts import EXTENSIONS
from lapilli.data.sources.captions import draw_prompt
from lapilli.data.sources.reading.bounds import too_large
from lapilli.data.sources.reading.files import annotation_files, file_error

__all__ = ["read"]


def read(config: SourceConfig, root: Path) -> Iterator[Any]:
    """An element a text file, in the order of their names, then images without a text.

    `annotations` is a glob of the texts (`photos/**/*.txt`). A text without an image, or with
    several, is an element that says so.

    Raises:
        DataError: A text lies outside the folder of `images`, or cannot be read.
    """
    above = root / config.images
    texts: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in annotation_files(config, root):
        texts[path.parent].append(path)
    for folder, files in texts.items():
        if not folder.is_relative_to(above):
            raise DataError(
                f"annotations: {files[0]} lies outside the folder {above}; set `images` of source "
                f"{config.name} to a folder above the texts"
            )
        images = _images(folder)
        for path in files:
            names = images.pop(path.stem, [])
            yield _element(path, [_key(folder / name, above) for name in names], config)
        for names in images.values():
            for name in names:
                key = _key(folder / name, above)
                stem = name.rpartition(".")[0]
                yield {"id": key, "image": key, "defect": f"no {stem}.txt beside it"}


def _images(folder: Path) -> dict[str, list[str]]:
    """The images of a folder by the name that a text beside them would have."""
    found: defaultdict[str, list[str]] = defaultdict(list)
    try:
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise file_error(folder, error) from None
    for name in names:
        stem, dot, extension = name.rpartition(".")
        if dot + extension.lower() in EXTENSIONS:
            found[stem].append(name)
    return found


def _key(path: Path, above: Path) -> str:
    return path.relative_to(above).as_posix()


def _element(path: Path, images: list[str], config: SourceConfig) -> dict[str, Any]:
    if len(images) != 1:
        found = f"{len(images)} images ({', '.join(images)})" if images else "no image"
        return {"id": path.stem, "defect": f"{found} beside {path.name}; expected one"}
    key = images[0]
    text = _text(path, config.max_record_bytes)
    if isinstance(text, dict):
        return {"id": key, "image": key, **text}
    return {"id": key, "image": key, "question": draw_prompt(config, key), "answer": text}


def _text(path: Path, most: int) -> str | dict[str, str]:
    """A file's text without the space around it, or what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        if is_denied(error):
            raise file_error(path, error) from None
        return {"defect": f"{path.name} cannot be read ({error.strerror})"}
    if len(data) > most:
        return {"defect": too_large(f"more than {most} bytes", most)}
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        return {"defect": f"{path.name} is not UTF-8 text ({error.reason})"}
