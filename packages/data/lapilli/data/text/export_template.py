"""Export a template and its tokenizer in the form transformers and vLLM read.

The chat template writes all of a prompt and the exported tokenizer adds nothing, so every way from
messages to ids gives training's. It pads on the left, as generation in batches needs it, and its
`eos_token` is the token that answers were trained to end with.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from lapilli.data.errors import DataError
from lapilli.data.record import ImagePart, Record, TextPart, Turn
from lapilli.data.text.encode import bind_template, encode_batch, segments_of
from lapilli.data.text.export_chat_template import IMAGE, chat_template
from lapilli.data.text.questions import Frames, find_frames
from lapilli.data.text.templates import Template
from lapilli.data.text.tokenizer import AnyTokenizer, backend_for, plain_backend, role_id

__all__ = [
    "TRIALS",
    "Exported",
    "TrainedEnd",
    "end_ids",
    "export_obstacle",
    "export_text",
    "messages_of",
    "prompt_ids",
    "trained_end",
]

TRIALS: tuple[tuple[Turn, ...], ...] = (
    (Turn("user", (ImagePart(0), TextPart("What is this?"))),),
    (
        Turn("user", (TextPart("Two, first"), ImagePart(0), TextPart(" and then "), ImagePart(1))),
        Turn("assistant", (TextPart("A cat, a dog."),)),
        Turn("user", (TextPart("Which is left?"),)),
    ),
    (Turn("user", (TextPart("No picture:\n1 + 1?"),)),),
    (
        Turn("system", (TextPart("Be brief."),)),
        Turn("user", (ImagePart(0), TextPart("\nWas ist das, für wen? \n"))),
    ),
)
"""Conversations whose ids an export must write as training does."""

ROLES = ("bos", "eos", "pad", "unk", "sep", "cls", "mask")


@dataclass(frozen=True)
class TrainedEnd:
    """What an answer was trained to end with.

    Attributes:
        token_id: The id that ends an answer by itself; None if nothing ends one, or a text of
            several tokens does.
        text: Its text; empty if nothing ends an answer.
        is_special: The id is a special token, which no text can produce.
    """

    token_id: int | None
    text: str
    is_special: bool


@dataclass(frozen=True)
class Exported:
    """What goes into an exported folder.

    Attributes:
        backend: The tokenizer; it has `<image>`.
        settings: `tokenizer_config.json`.
        chat_template: Jinja source.
        image_id: Id of `<image>`.
        end: What ends an answer.
        end_ids: Each ends an answer: the trained end, and the original tokenizer's eos.
        template: The template, which writes with the exported tokenizer what it wrote with the
            original.
    """

    backend: Tokenizer
    settings: dict[str, Any]
    chat_template: str
    image_id: int
    end: TrainedEnd
    end_ids: tuple[int, ...]
    template: Template

    def tokenizer(self) -> Any:
        """As transformers loads it from the folder."""
        from transformers import PreTrainedTokenizerFast

        made: Any = PreTrainedTokenizerFast
        settings = {k: v for k, v in self.settings.items() if k != "tokenizer_class"}
        return made(tokenizer_object=self.backend, **settings)

    def token_id(self, role: str) -> int | None:
        """The id of `bos`, `eos` or `pad`, if there is one."""
        content = self.settings.get(f"{role}_token")
        return None if content is None else self.backend.token_to_id(content)

    def write(self, folder: Path) -> None:
        """Write the tokenizer's files and the chat template.

        `PreTrainedTokenizerFast` is a class of transformers 4 and 5 that takes `tokenizer.json` as
        it is. Up to 4.50 a tokenizer's chat template is read from its settings alone.
        """
        self.backend.save(str(folder / "tokenizer.json"))
        named = {f"{role}_token" for role in ROLES} & self.settings.keys()
        texts = {
            "tokenizer_config.json": json.dumps(self.settings, indent=2, ensure_ascii=False),
            "special_tokens_map.json": json.dumps(
                {name: self.settings[name] for name in sorted(named)}, indent=2, ensure_ascii=False
            ),
            "chat_template.jinja": self.chat_template,
        }
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def prompt_ids(turns: Sequence[Turn], tokenizer: AnyTokenizer, template: Template) -> list[int]:
    """The ids of a conversation up to where the next answer begins, -200 for each image.

    Raises:
        DataError: The template refuses the conversation.
    """
    # One that trains everything has no span that begins with the answer, nor has one that writes
    # nothing between two answers.
    before = [turn._replace(trains=False) for turn in turns]
    answered = (*before, Turn("assistant", (TextPart("a"),)))
    template = replace(template, trains="answers")
    record = Record(record_id="", sample_id="", source="", turns=answered, images=())
    encoded = encode_batch([record], tokenizer, template, warn=False)[0]
    return encoded.input_ids[: encoded.label_spans[-2]]


def export_text(template: Template, tokenizer: Any) -> Exported:
    """Tokenizer and chat template for transformers.

    Args:
        template: The template, bound to the tokenizer (`tokenize.bind_template`).
        tokenizer: transformers' tokenizer that the records were made with; it is not changed.
    """
    backend = plain_backend(tokenizer)
    backend.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    end = trained_end(template, tokenizer)
    source = chat_template(template, tokenizer)
    settings = _settings(tokenizer, backend)
    own_eos = settings.get("eos_token")
    if end.is_special and end.text != own_eos:
        settings["eos_token"] = end.text
        if template.chat:  # which may write the old one
            eos = f"{{%- set eos_token = {json.dumps(own_eos or '', ensure_ascii=False)} %}}"
            source, template = eos + source, replace(template, chat=f"{eos}\n{template.chat}")
    settings["chat_template"] = source
    image_id = backend.token_to_id(IMAGE)
    assert image_id is not None
    ends = end_ids(end, tokenizer)
    return Exported(
        backend=backend,
        settings=settings,
        chat_template=source,
        image_id=image_id,
        end=end,
        end_ids=ends,
        template=_spelt_out(template, tokenizer),
    )


def end_ids(end: TrainedEnd, tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer in every form of an export: the trained end, and the tokenizer's eos."""
    found = (end.token_id, role_id(tokenizer, "eos"))
    return tuple(dict.fromkeys(number for number in found if number is not None))


def trained_end(template: Template, tokenizer: Any) -> TrainedEnd:
    """What answers of a template end with.

    Args:
        template: The template.
        tokenizer: transformers' tokenizer that the records were made with.

    Raises:
        DataError: The template cannot be written with this tokenizer.
    """
    frames = find_frames(template, tokenizer)
    backend = backend_for(tokenizer).first
    if frames.end_id is not None:
        return TrainedEnd(frames.end_id, backend.id_to_token(frames.end_id) or "", True)
    return TrainedEnd(_single_id(frames, template, tokenizer), frames.end, False)


def _single_id(frames: Frames, template: Template, tokenizer: Any) -> int | None:
    """The id of an end marker that is one token after every answer."""
    if not frames.end:
        return None
    template = replace(template, trains="answers")
    rows: list[list[int]] = []
    for answer in ("a", "It is red.", "two\nlines"):
        turns = (Turn("user", (TextPart("a"),)), Turn("assistant", (TextPart(answer),)))
        encoded = encode_batch(
            [Record(record_id="", sample_id="", source="", turns=turns, images=())],
            tokenizer,
            template,
            warn=False,
        )[0]
        rows.append(encoded.input_ids[slice(*encoded.label_spans[-2:])])
    last = {ids[-1] for ids in rows}
    backend = backend_for(tokenizer).first
    # behind a letter, as a tokenizer may put a space before a text of its own
    texts = [backend.decode(ids, skip_special_tokens=False) for ids in rows]
    shorter = [backend.decode(ids[:-1], skip_special_tokens=False) for ids in rows]
    is_end = all(a == b + frames.end for a, b in zip(texts, shorter, strict=True))
    return last.pop() if len(last) == 1 and is_end else None


def _settings(tokenizer: Any, backend: Tokenizer) -> dict[str, Any]:
    """What transformers needs beside `tokenizer.json`."""
    named: dict[str, str] = {}
    for role in ROLES:
        content = getattr(tokenizer, f"{role}_token", None)
        if content is None and (number := role_id(tokenizer, role) if role in _BARE else None):
            content = backend.id_to_token(number)
        if content is not None:
            named[f"{role}_token"] = str(content)
    # a batch is filled with something that the model never attends to
    for role in ("unk_token", "eos_token"):
        if "pad_token" not in named and role in named:
            named["pad_token"] = named[role]
    longest = getattr(tokenizer, "model_max_length", None)
    step: dict[str, Any] = json.loads(backend.to_str()).get("pre_tokenizer") or {}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "padding_side": "left",
        # transformers 4 gives token_type_ids otherwise, which its LLaVA does not take
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # transformers 4 sets it in the file to what is said here, false if nothing is
        **({"add_prefix_space": step["add_prefix_space"]} if "add_prefix_space" in step else {}),
        **({"model_max_length": longest} if isinstance(longest, int) and longest < 1e9 else {}),
    }


_BARE = ("bos", "eos", "pad", "unk")


def _spelt_out(template: Template, tokenizer: Any) -> Template:
    """The template with its tokenizer's decisions in it: whether it writes a bos, which eos."""
    if template.chat:
        return template
    backend = backend_for(tokenizer)
    ends = backend.roles.get("eos", [])
    told = {
        "{bos}": "{bos!}" if backend.roles["bos"] else "",
        "{eos}": f"{{{backend.first.id_to_token(ends[0])}}}" if ends else "{eos}",
    }
    fields: dict[str, str] = {}
    for name in (
        "opening", "before_system", "after_system", "before_user", "after_user", "before_answer",
        "answer_start", "answer_end", "after_answer", "image_start", "image_end",
    ):  # fmt: skip
        frame: str = getattr(template, name)
        for word, meant in told.items():
            frame = frame.replace(word, meant)
        fields[name] = frame
    return replace(template, **fields)


def export_obstacle(template: Template, tokenizer: Any) -> str:
    """Why transformers would write other ids than training for these two; "" if it writes the same.

    Args:
        template: The template.
        tokenizer: transformers' tokenizer. One read without transformers is not compared here.

    Raises:
        DataError: The template cannot be written with this tokenizer at all.
    """
    template = bind_template(template, tokenizer)
    if spelt := _spelt_special(template, tokenizer):
        return (
            f"template {template.name}: it writes {spelt!r} as text, which is a special token of "
            "this tokenizer, so that transformers would read other ids; take a template with "
            f"{{{spelt}}} in its frames, or another tokenizer"
        )
    if importlib.util.find_spec("transformers") is None:  # planning a training compares the ids
        return ""
    exported = export_text(template, tokenizer)
    written = exported.tokenizer()
    for turns, expected in _trials(template, tokenizer):
        try:
            found = _ids(written, turns, exported)
        except Exception as error:  # a template is a program of others: it may raise anything
            found, why = None, " ".join(str(error).split()) or type(error).__name__
        else:
            why = ""
        if found is None:
            return (
                f"template {template.name}: with content in parts, as transformers' processors "
                f"give it, its chat template fails ({why}); take another template"
            )
        if found != expected:
            return _different(template, found, expected, written)
    return ""


def _trials(template: Template, tokenizer: Any) -> Iterator[tuple[tuple[Turn, ...], list[int]]]:
    """The trials that the template takes, with training's ids."""
    for turns in TRIALS:
        try:
            yield turns, prompt_ids(turns, tokenizer, template)
        except DataError:
            continue  # a chat template may refuse a system turn; then no record has one


def _spelt_special(template: Template, tokenizer: Any) -> str:
    """A special token of the tokenizer that a frame spells as text."""
    backend = backend_for(tokenizer)
    said = (Turn("user", (TextPart("a"),)), Turn("assistant", (TextPart("b"),)))
    if template.chat:
        return ""  # there a token's text in a frame is the token
    for segment in segments_of(
        Record(record_id="", sample_id="", source="", turns=said * 2), tokenizer, template
    ):
        text: str = getattr(segment, "text", "")
        for name in backend.specials:
            if name in text:
                return name
    return ""


def messages_of(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A conversation as transformers' processors take it."""
    return [
        {
            "role": turn.role,
            "content": [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image"}
                for part in turn.parts
            ],
        }
        for turn in turns
    ]


def _ids(written: Any, turns: Sequence[Turn], exported: Exported) -> list[int]:
    text: str = written.apply_chat_template(
        messages_of(turns),
        chat_template=exported.chat_template,
        tokenize=False,
        add_generation_prompt=True,
    )
    found: list[int] = written(text)["input_ids"]
    return [-200 if number == exported.image_id else number for number in found]


def _different(template: Template, found: list[int], expected: list[int], written: Any) -> str:
    at = next((n for n, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), -1)
    if at < 0:
        at = min(len(found), len(expected))

    def shown(ids: list[int]) -> str:
        pieces = [IMAGE if i < 0 else written.convert_ids_to_tokens(i) for i in ids[at : at + 3]]
        return " ".join(map(repr, pieces)) or "nothing"

    return (
        f"template {template.name}: transformers would write other ids than training, from place "
        f"{at} on ({shown(found)} for {shown(expected)}): a prompt's text is cut otherwise without "
        "the answer behind it; take another template, or a tokenizer that has its special tokens"
    )
