"""Answer questions about an image, a folder of images or a file of questions.

lapilli generate runs/finetune --image cat.jpg --question "What is this?"
lapilli generate exports/finetune --questions questions.jsonl --images images \
    --output answers.jsonl
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict, cast

from lapilli.data.errors import DataError
from lapilli.data.io.access import exists, is_folder, naming, require_listable
from lapilli.data.io.printable import one_line
from lapilli.data.io.typed_json import JsonError, from_json
from lapilli.data.io.whole_file import MOST_LINES, read_whole
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.mounts.places import EXTENSIONS, LARGEST_FILE
from lapilli.model.config import Decoding
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
        return [Asked(0, config.question, (), "question")]
    image = Path(config.image)
    if not is_folder(image):
        return [Asked(image.name, config.question, (existing(image, "image"),), str(image))]
    require_listable(image)
    found = sorted(path for path in image.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(
            f"image: no image in {image}; expected files such as a.jpg, b.png or c.webp"
        )
    return [
        Asked(str(path.relative_to(image)), config.question, (path,), str(path)) for path in found
    ]


def _question(asked: Asked, marker: str) -> Question:
    """What the model is asked; files are read at the last moment."""
    images: list[bytes] = []
    for path in asked.images:
        with naming(path):
            images.append(read_whole(path, LARGEST_FILE))
    only = asked.images[0] if asked.images else asked.question_id
    name = asked.name if len(images) > 1 else str(only)
    return Question.of(asked.text, *images, name=name, marker=marker)


def _check(assistant: Assistant, asked: Sequence[Asked], decoding: Decoding) -> None:
    """Find what cannot be asked before anything is: the places of images, and lengths."""
    marker = assistant.template.image_marker
    nothing = ((one, (b"",) * len(one.images)) for one in asked)
    questions = (Question.of(o.text, *images, name=o.name, marker=marker) for o, images in nothing)
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
    _check(assistant, asked, config.decoding)
    if output:
        return _to_file(assistant, asked, config, output)
    if len(asked) == 1:
        question = _question(asked[0], assistant.template.image_marker)
        answers = assistant.answer([question], config.decoding, on_text=stream_text)
        print()
        return answers
    answers: list[str] = []
    for batch, texts in _batches(assistant, asked, config):
        answers += texts
        for one, text in zip(batch, texts, strict=True):
            say_text(f"{one_line(str(one.question_id))}: {text}")
    return answers


def _to_file(
    assistant: Assistant, asked: list[Asked], config: GenerateConfig, output: Path
) -> list[str]:
    """Append a line an answer, as soon as there is one; go on after what is there."""
    how = {"model_id": assistant.name, "metadata": asdict(config.decoding)}
    keys = _keys([(one.question_id, one.text) for one in asked])
    known = _read_answers(output, how)
    if strange := sorted(known.keys() - {*keys}):
        raise DataError(
            f"output: {output} answers question {strange[0][0]}, which is not asked now; choose "
            "another file"
        )
    missing = [number for number, key in enumerate(keys) if key not in known]
    if known:
        say(f"{len(known)} of {len(asked)} answers are in {output} already")
    numbers = iter(missing)
    with naming(output), output.open("a", encoding="utf-8") as file:
        for batch, texts in _batches(assistant, [asked[number] for number in missing], config):
            for one, text in zip(batch, texts, strict=True):
                known[keys[next(numbers)]] = text
                row = {"question_id": one.question_id, "prompt": one.text, "text": text, **how}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
    say(f"{len(asked)} answers in {output}")
    return [known[key] for key in keys]


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
    assistant: Assistant, asked: list[Asked], config: GenerateConfig
) -> Iterator[tuple[list[Asked], list[str]]]:
    with progress_bar() as bar:
        task = bar.add_task("questions", total=len(asked))
        for start in range(0, len(asked), config.batch):
            batch = asked[start : start + config.batch]
            questions = [_question(one, assistant.template.image_marker) for one in batch]
            texts = assistant.answer(questions, config.decoding)
            yield batch, texts
            bar.update(task, completed=start + len(batch))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    generate(parse(GenerateConfig, first_as("model", argv), "Ask a trained model about images."))
    return 0


if __name__ == "__main__":
    run(main)
