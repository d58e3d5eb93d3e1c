"""Answer questions about an image, a folder of images or a file of questions.

lapilli generate runs/finetune --image cat.jpg --question "What is this?"
lapilli generate exports/finetune --questions questions.jsonl --images images \
    --output answers.jsonl
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, TypedDict, cast

from lapilli.data.errors import DataError
from lapilli.data.io.access import exists, is_folder, naming, require_listable
from lapilli.data.io.local_copy import local_copy
from lapilli.data.io.printable import one_line
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.mounts.places import EXTENSIONS, LARGEST_FILE
from lapilli.data.record import TextPart, Turn
from lapilli.model.config import Decoding
from lapilli.train.checkpoint.at_hand import local_run
from lapilli.train.device import choose_device, torch_device, visible_devices
from lapilli.train.inference.assistant import Assistant, Question, open_assistant
from pipelines.cli.command import (
    first_as,
    parse,
    progress_bar,
    run,
    say,
    say_text,
    stream_text,
)
from pipelines.cli.question_file import Asked, existing, read_questions
from pipelines.cli.settings import GenerateConfig


class _Form(NamedTuple):
    """How a question is written down: what stands before it, and what marks an image's place."""

    prefix: str
    marker: str


def collect(config: GenerateConfig) -> list[Asked]:
    """The questions that the settings name.

    Raises:
        DataError: Nothing or too much named, a file that is not there, a line that is no question.
    """
    if config.batch < 1:
        raise DataError(f"batch: {config.batch}; expected at least 1")
    if config.questions:
        if config.image or config.question:
            raise DataError("questions: named beside image or question; expected one or the other")
        return read_questions(Path(config.questions), Path(config.images))
    if not (config.image or config.question):
        raise DataError("nothing asked; pass --image, --question, or --questions FILE.jsonl")
    if not config.image:
        return [Asked(question_id=0, text=config.question, images=(), name="question")]
    image = Path(config.image)
    if not is_folder(image):
        return [_asked(config, image.name, existing(image, "image"))]
    require_listable(image)
    found = sorted(path for path in image.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(
            f"image: no image in {image}; expected files such as a.jpg, b.png or c.webp"
        )
    return [_asked(config, str(path.relative_to(image)), path) for path in found]


def _asked(config: GenerateConfig, question_id: str, image: Path) -> Asked:
    return Asked(question_id=question_id, text=config.question, images=(image,), name=str(image))


def _question(
    asked: Sequence[Asked], number: int, known: Mapping[int, str], form: _Form
) -> Question:
    """What the model is asked, behind the conversation so far; files are read at the last moment.

    Args:
        asked: All questions.
        number: Of the one.
        known: Answers by number, those of its conversation among them.
        form: How it is written down.
    """
    first, *later = asked[number - asked[number].turn : number + 1]
    images: list[bytes] = []
    for path in first.images:
        with naming(path):
            images.append(read_whole(path, LARGEST_FILE))
    only = first.images[0] if first.images else first.question_id
    name = first.name if len(images) > 1 else str(only)
    found = Question.of(form.prefix + first.text, *images, name=name, marker=form.marker)
    turns = [*found.turns]
    for place, one in enumerate(later, number - len(later)):
        turns.append(Turn("assistant", (TextPart(known[place]),)))
        turns.append(Turn("user", (TextPart(form.prefix + one.text),)))
    return replace(found, turns=tuple(turns))


def _check(assistant: Assistant, asked: Sequence[Asked], decoding: Decoding, form: _Form) -> None:
    """Find what cannot be asked before anything is: the places of images, and lengths."""
    nothing = ((one, (b"",) * len(one.images)) for one in asked)
    questions = (
        Question.of(form.prefix + one.text, *images, name=one.name, marker=form.marker)
        for one, images in nothing
    )
    assistant.check(questions, decoding)


def generate(config: GenerateConfig) -> list[str]:
    """Answer all of it: one question streams to the terminal, several show progress.

    Returns:
        The answers, those that the output had already included, in the order of the questions.

    Raises:
        DataError: Another process writes the output, or it cannot be written; questions that
            cannot be asked.
    """
    asked = collect(config)
    if not config.output:
        return _generate(config, asked, None)
    output = Path(config.output)
    if not is_folder(output.absolute().parent):
        raise DataError(f"output: {output} is in no folder; make the folder first")
    if is_folder(output):
        raise DataError(f"output: {output} is a folder; expected a file")
    with only_writer(output, "written", beside=True):
        return _generate(config, asked, output)


def _generate(config: GenerateConfig, asked: list[Asked], output: Path | None) -> list[str]:
    device = torch_device(choose_device(config.device, visible_devices()))
    assistant = open_assistant(
        Path(config.model), device, config.trust, template=config.template, view=config.view
    )
    form = _Form(config.prefix, assistant.template.image_marker)
    _check(assistant, asked, config.decoding, form)
    if output:
        return _to_file(assistant, asked, config, output)
    if len(asked) == 1:
        question = _question(asked, 0, {}, form)
        answers = assistant.answer([question], config.decoding, on_text=stream_text)
        print()
        return answers
    known: dict[int, str] = {}
    for numbers in _batches(assistant, asked, known, config):
        for number in numbers:
            say_text(f"{one_line(str(asked[number].question_id))}: {known[number]}")
    return [known[number] for number in range(len(asked))]


def _to_file(
    assistant: Assistant, asked: list[Asked], config: GenerateConfig, output: Path
) -> list[str]:
    """Append a line an answer, as soon as there is one; go on after what is there."""
    asking = {"prefix": config.prefix} if config.prefix else {}
    how = {"model_id": assistant.name, "metadata": asdict(config.decoding) | asking}
    keys = _keys([(one.question_id, one.text) for one in asked])
    found = _read_answers(output, how)
    if strange := sorted(found.keys() - {*keys}):
        raise DataError(
            f"output: {output} answers question {strange[0][0]}, which is not asked now; choose "
            "another file"
        )
    known = {number: found[key] for number, key in enumerate(keys) if key in found}
    if known:
        say(f"{len(known)} of {len(asked)} answers are in {output} already")
    with naming(output), output.open("a", encoding="utf-8") as file:
        for numbers in _batches(assistant, asked, known, config):
            for number in numbers:
                one = asked[number]
                row = {"question_id": one.question_id, "prompt": one.text, "text": known[number]}
                file.write(json.dumps({**row, **how}, ensure_ascii=False) + "\n")
            file.flush()
    say(f"{len(asked)} answers in {output}")
    return [known[number] for number in range(len(asked))]


Key = tuple[str, str, int]


def _keys(questions: Sequence[tuple[Any, str]]) -> list[Key]:
    """What makes each the same question in another call: id, text, and which of such equals."""
    seen: Counter[tuple[str, str]] = Counter()
    keys: list[Key] = []
    for question_id, text in questions:
        pair = (json.dumps(question_id), text)
        keys.append((*pair, seen[pair]))
        seen[pair] += 1
    return keys


def _read_answers(output: Path, how: dict[str, Any]) -> dict[Key, str]:
    """The answers of an earlier call, by question; a last line cut short is taken off.

    Raises:
        DataError: A file of something else, or of another model or decoding.
    """
    if not exists(output):
        return {}
    data = read_whole(output, MOST_LINES)
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data) and not data[len(whole) :].startswith(b"{"):
        raise DataError(f"output: {output} is no file of answers; choose another file")
    rows = [_row(output, number, line) for number, line in enumerate(whole.split(b"\n")[:-1], 1)]
    for row in rows:
        for name, value in how.items():
            if row[name] != value:
                raise DataError(
                    f"output: {output} has answers with {name} {row[name]}, now {value}; choose "
                    "another file"
                )
    os.truncate(output, len(whole))
    keys = _keys([(row["question_id"], row["prompt"]) for row in rows])
    return {key: row["text"] for key, row in zip(keys, rows, strict=True)}


class _Row(TypedDict):
    question_id: Any
    prompt: str
    text: str
    model_id: str
    metadata: dict[str, Any]


def _row(output: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        return cast("dict[str, Any]", from_json(line, _Row))
    except JsonError as error:
        raise DataError(
            f"output: {output} line {number} is no answer ({error}); choose another file"
        ) from None


def _batches(
    assistant: Assistant, asked: list[Asked], known: dict[int, str], config: GenerateConfig
) -> Iterator[list[int]]:
    """Ask what has no answer, first questions first; yields the numbers of those that got one.

    Args:
        assistant: Who answers.
        asked: The questions; later ones of a conversation stand behind its first.
        known: Answers by number; new ones are added.
        config: The batch and the decoding.
    """
    missing = [number for number in range(len(asked)) if number not in known]
    missing.sort(key=lambda number: asked[number].turn)
    form = _Form(config.prefix, assistant.template.image_marker)
    with progress_bar() as bar:
        task = bar.add_task("questions", total=len(missing))
        for _, group in groupby(missing, key=lambda number: asked[number].turn):
            rest = [*group]
            for start in range(0, len(rest), config.batch):
                numbers = rest[start : start + config.batch]
                questions = [_question(asked, number, known, form) for number in numbers]
                texts = assistant.answer(questions, config.decoding)
                known.update(zip(numbers, texts, strict=True))
                yield numbers
                bar.advance(task, len(numbers))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        GenerateConfig, first_as("model", argv), "Ask a trained model about images.",
        copied={"model": local_run, "questions": local_copy},
    )  # fmt: skip
    generate(config)
    return 0


if __name__ == "__main__":
    run(main)
