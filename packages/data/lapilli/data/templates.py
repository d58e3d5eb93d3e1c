"""Templates: how a conversation becomes text, special tokens and image slots, and what is trained.

A `Template` is data. `render` turns a record into segments by it; no tokenizer is needed, so the
trained characters are known from the conversation's structure alone.

The strings that frame a turn (`opening`, `before_user`, `answer_end`, ...) may name special tokens
in braces: `{bos}` and `{eos}` are the tokenizer's own, any other name is a token's literal content,
as in `{<|im_start|>}`. Braces mean something in those strings only, never in the text of a record
or of a system prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import yaml

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Part, Record, TextPart, Turn

__all__ = [
    "TEMPLATES",
    "ImageSlot",
    "Segment",
    "SpecialToken",
    "Template",
    "TextSegment",
    "get_template",
    "render",
]


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is written down.

    A record becomes `opening`, then `before_system` + system text + `after_system` where there is
    a system text, then each turn in its frame. Frames may name special tokens in braces.

    Attributes:
        name: What the manifest calls it.
        opening: Frame at the very start. A `{bos}` is left out for a tokenizer that adds none.
        system: System text of a record that has no system turn of its own. Plain text.
        before_system: Frame before the system text.
        after_system: Frame after the system text.
        before_user: Frame before a user's turn.
        after_user: Frame after a user's turn.
        before_answer: Frame before an answer: the end of what a prompt gives the model.
        answer_start: Trained frame between `before_answer` and the answer, such as the space that
            many tokenizers join with the answer's first word.
        answer_end: Trained frame after the answer: what tells the model to stop.
        after_answer: Untrained frame after `answer_end`.
        trains: "answers": each answer with `answer_start` and `answer_end`; "all": all but images.
        drops_user_text: Keep only the images of a user's turn, and no word of it.
        images_first: Move a turn's images to its front, each followed by a newline, and strip
            white space around the turn. A turn without images stays as it is.
    """

    name: str
    opening: str = "{bos}"
    system: str = ""
    before_system: str = ""
    after_system: str = ""
    before_user: str = ""
    after_user: str = ""
    before_answer: str = ""
    answer_start: str = ""
    answer_end: str = "{eos}"
    after_answer: str = ""
    trains: Literal["answers", "all"] = "answers"
    drops_user_text: bool = False
    images_first: bool = False


@dataclass(frozen=True, slots=True)
class TextSegment:
    """Text to be tokenised in one piece; `trained` are its trained character ranges, in order."""

    text: str
    trained: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class SpecialToken:
    """One id that no text can produce: "bos", "eos" or a token's content."""

    name: str
    trained: bool = False


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """The place of image number `index` of the record."""

    index: int


Segment: TypeAlias = TextSegment | SpecialToken | ImageSlot

# The wording a Vicuna model was trained with; another wording would be another template.
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

_PLAIN = Template(name="plain", answer_end="\n", drops_user_text=True, images_first=True)

_V1 = Template(
    name="v1",
    system=_VICUNA_SYSTEM,
    after_system=" ",
    before_user="USER: ",
    after_user=" ",
    before_answer="ASSISTANT:",
    answer_start=" ",
    answer_end="{eos}",
    images_first=True,
)

TEMPLATES: dict[str, Template] = {"plain": _PLAIN, "v1": _V1, "vicuna_v1": _V1}


def get_template(name_or_path: str | Path | Template) -> Template:
    """The template of that name, or from that `.yaml` file; a Template is returned as it is.

    Raises:
        DataError: For an unknown name, a missing file, and a file that is no template.
    """
    if isinstance(name_or_path, Template):
        return name_or_path
    if Path(name_or_path).suffix in {".yaml", ".yml"}:
        return _load_template(Path(name_or_path))
    if str(name_or_path) not in TEMPLATES:
        names = ", ".join(sorted(TEMPLATES))
        raise DataError(
            f"template {str(name_or_path)!r} is unknown: take one of {names}, "
            "or give the path of a .yaml file"
        )
    return TEMPLATES[str(name_or_path)]


def _load_template(path: Path) -> Template:
    """Read a template from a YAML mapping whose keys are the fields; `name` may be left out."""
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"template file {path}: {reason}; check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"template file {path} is not YAML: {what}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"template file {path}: expected a mapping of fields, found {kind}")
    settings: dict[str, Any] = {"name": path.stem} | cast("dict[str, Any]", content)
    for key, value in settings.items():
        _check_setting(path, key, value)
    return Template(**settings)


def _check_setting(path: Path, key: str, value: object) -> None:
    """Refuse a key that is no field, and a value that is not of the field's type."""
    known: dict[str, object] = {field.name: field.default for field in fields(Template)}
    if key not in known:
        raise DataError(
            f"template file {path}: unknown key {key!r}; the keys are {', '.join(known)}"
        )
    if key == "trains" and value not in ("answers", "all"):
        raise DataError(f"template file {path}: trains is 'answers' or 'all', found {value!r}")
    default = known[key]
    expected: type[object] = str if default is MISSING else type(default)
    if not isinstance(value, expected):
        raise DataError(
            f"template file {path}: {key} is {expected.__name__}, found {value!r}; quote a text"
        )


def render(record: Record, template: Template) -> list[Segment]:
    """Write the record down: text, special tokens and image slots in their order.

    A leading system turn replaces the template's system text (LLaVA knows no system turn, this is
    our choice). An answer before the first question is left out, as LLaVA does: nothing asks for
    it. Neighbouring text is one segment, so the text is tokenised as it would be as a whole.

    Raises:
        DataError: For a system turn that is not the first turn.
    """
    system, turns = template.system, record.turns
    if turns and turns[0].role == "system":
        system, turns = turns[0].text, turns[1:]
    if turns and turns[0].role == "assistant":
        turns = turns[1:]
    page = _Page(train_all=template.trains == "all")
    page.frame(template.opening)
    if system:
        page.frame(template.before_system)
        page.write(system)
        page.frame(template.after_system)
    for turn in turns:
        if turn.role == "user":
            page.frame(template.before_user)
            page.parts(_user_parts(turn, template))
            page.frame(template.after_user)
        elif turn.role == "assistant":
            page.frame(template.before_answer)
            page.frame(template.answer_start, trained=True)
            page.parts(turn.parts, trained=True)
            page.frame(template.answer_end, trained=True)
            page.frame(template.after_answer)
        else:
            raise DataError(
                f"record {record.sample_id}: a system turn may only stand first; move or remove it"
            )
    return page.finish()


def _user_parts(turn: Turn, template: Template) -> tuple[Part, ...]:
    """What a template keeps of a user's turn, in its order."""
    images = [part for part in turn.parts if isinstance(part, ImagePart)]
    if template.drops_user_text:
        return tuple(images)
    if not (template.images_first and images):
        return turn.parts
    text = turn.text.strip()
    moved: list[Part] = []
    for image in images:
        moved += (image, TextPart("\n"))
    # The turn as a whole is stripped, so a turn of images alone ends on its last image.
    return (*moved, TextPart(text)) if text else tuple(moved[:-1])


class _Page:
    """Collects segments, joining neighbouring text and its trained ranges."""

    def __init__(self, *, train_all: bool) -> None:
        self._train_all = train_all
        self._segments: list[Segment] = []
        self._texts: list[str] = []
        self._length = 0
        self._trained: list[tuple[int, int]] = []

    def write(self, text: str, *, trained: bool = False) -> None:
        """Add plain text."""
        if not text:
            return
        start, self._length = self._length, self._length + len(text)
        self._texts.append(text)
        if not (trained or self._train_all):
            return
        if self._trained and self._trained[-1][1] == start:
            start = self._trained.pop()[0]
        self._trained.append((start, self._length))

    def frame(self, frame: str, *, trained: bool = False) -> None:
        """Add a template's string: text and special tokens."""
        for is_special, content in _split_frame(frame):
            if is_special:
                self._close_text()
                self._segments.append(SpecialToken(content, trained or self._train_all))
            else:
                self.write(content, trained=trained)

    def parts(self, parts: tuple[Part, ...], *, trained: bool = False) -> None:
        """Add what a turn says."""
        for part in parts:
            if isinstance(part, TextPart):
                self.write(part.text, trained=trained)
            else:
                self._close_text()
                self._segments.append(ImageSlot(part.index))

    def finish(self) -> list[Segment]:
        """All segments; the page takes no more."""
        self._close_text()
        return self._segments

    def _close_text(self) -> None:
        if self._texts:
            self._segments.append(TextSegment("".join(self._texts), tuple(self._trained)))
            self._texts, self._length, self._trained = [], 0, []


@lru_cache(maxsize=256)
def _split_frame(frame: str) -> tuple[tuple[bool, str], ...]:
    """`"a{eos}b"` as `((False, "a"), (True, "eos"), (False, "b"))`."""
    return tuple(_frame_pieces(frame))


def _frame_pieces(frame: str) -> Iterator[tuple[bool, str]]:
    # Splitting on one group alternates: text, name, text, name, ..., text.
    for number, content in enumerate(re.split(r"\{([^{}]+)\}", frame)):
        if content:
            yield number % 2 == 1, content
