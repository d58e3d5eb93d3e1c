"""Parse settings from recipes and flags, and report errors as one line."""

from __future__ import annotations

import os
import signal
import sys
import traceback
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any, TypeAlias, TypeVar, cast

import yaml
from jsonargparse import ArgumentParser, get_loader, set_loader
from rich.cells import cell_len
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from lapilli.data.errors import DataError
from lapilli.data.io.access import blame, system_error
from lapilli.data.io.addresses import hide_secrets, refuse_address, refuse_secrets
from lapilli.data.io.filesystems import is_remote
from lapilli.data.io.printable import one_line, spell_out
from lapilli.data.io.yaml_text import load_yaml
from lapilli.model.errors import ModelError
from lapilli.train.errors import TrainError
from pipelines.cli.old_names import MOVED_FLAGS, describe_old_names
from pipelines.cli.recipes import RecipeError, with_recipes
from pipelines.cli.terminal import console, flush_output, safe_output

__all__ = [
    "PLACES",
    "UsageError",
    "console",
    "first_as",
    "missing_extra",
    "parse",
    "progress_bar",
    "read_arguments",
    "refuse_addresses",
    "run",
    "say",
    "say_text",
    "say_title",
    "stream_text",
    "with_switches",
]

Config = TypeVar("Config")
Bring: TypeAlias = Callable[[str, str], Path]  # of an address and its setting
USERS_MISTAKE = 2
# Settings that name a file or folder of this machine. Those that may be addresses are checked where
# they are used: sources, `checkpoint.upload`, `validation.dataset`.
PLACES = frozenset(
    {"answers", "data", "dataset", "eval", "extra_roots", "folder", "folders", "html", "image",
     "images", "include_path", "init_from", "model", "nvme_path", "ocr_vqa_list", "output",
     "pretrained", "questions", "recipe", "root", "run", "script", "step", "template",
     "tokenizer", "truth", "upload_file"}
)  # fmt: skip
# The extra that brings a package; the ones that every install has are not here.
EXTRAS = {
    "ray": "data", "transformers": "text", "torch": "train", "deepspeed": "train", "peft": "train",
    "safetensors": "train", "accelerate": "train", "starlette": "chat", "uvicorn": "chat",
}  # fmt: skip
LONGEST_MISTAKE = 1200  # characters: it may hold a value of a recipe
_yaml_load: Callable[[str], Any] = get_loader("yaml")


class UsageError(Exception):
    """A flag or a recipe's key that is wrong."""


def parse(
    kind: type[Config],
    argv: Sequence[str] | None,
    description: str,
    addresses: Sequence[str] = (),
    copied: Mapping[str, Bring] | None = None,
) -> Config:
    """Read a config dataclass from `--config RECIPE.yaml` (several are layered) and flags.

    Args:
        kind: The dataclass.
        argv: The arguments; None for the command's own.
        description: What the command does, for its help.
        addresses: Those of `PLACES` that may be addresses (`s3://bucket/folder`) here.
        copied: Those of whose address a copy on this machine is used, which these functions make.

    Raises:
        UsageError: An unknown or renamed key, a wrong type, something missing; names the field.
        DataError: An address with a password, which is not repeated, or one where a path of this
            machine is expected.
    """
    parser = ArgumentParser(description=description, exit_on_error=False)
    parser.add_argument(
        "--config",
        action="config",
        help="a recipe's path or name (llava15/finetune); several are layered",
    )
    parser.add_class_arguments(kind)
    arguments = with_switches(kind, sys.argv[1:] if argv is None else argv)
    try:
        known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
        arguments = with_recipes(arguments, _load_recipe, known)
    except (RecipeError, yaml.YAMLError) as error:
        raise UsageError(" ".join(str(error).split())) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"a recipe is not UTF-8 text ({error.reason})") from None
    if renamed := describe_old_names(kind, arguments):
        raise UsageError(renamed)
    namespace = read_arguments(parser, arguments, addresses, copied)
    return kind(**{item.name: namespace[item.name] for item in fields(kind)})  # type: ignore[arg-type]


def first_as(name: str, argv: Sequence[str] | None) -> list[str]:
    """The arguments, where a first one without dashes is the value of `--name`."""
    words = [*(sys.argv[1:] if argv is None else argv)]
    if words and not words[0].startswith("-"):
        words[0] = f"--{name}={words[0]}"
    return words


def read_arguments(
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    addresses: Sequence[str] = (),
    copied: Mapping[str, Bring] | None = None,
) -> Any:
    """Parse arguments with a parser made with `exit_on_error=False`.

    Raises:
        UsageError, DataError: As `parse`.
    """
    if get_loader("yaml") is not _load_recipe:
        set_loader("yaml", _load_recipe, (yaml.YAMLError,))
    try:
        found = parser.parse_args(argv)
        settings = found.as_dict()
        _refuse_secrets("", settings)
        copied = copied or {}
        refuse_addresses("", settings, PLACES.difference(addresses, copied))
        for name, bring in copied.items():
            if is_remote(str(found[name])):
                found[name] = str(bring(found[name], name))
        return parser.instantiate_classes(found)
    except ArgumentError as error:
        said = " ".join(str(error).split())
        given = {word.partition("=")[0] for word in said.split()}
        moved = [f"{flag}: now {verb}" for flag, verb in MOVED_FLAGS.items() if flag in given]
        raise UsageError("; ".join([*moved, said])) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"a recipe is not UTF-8 text ({error.reason})") from None


def _load_recipe(text: str) -> Any:
    """A recipe, or the value of a flag."""
    return load_yaml(text, _yaml_load)


def _refuse_secrets(setting: str, value: object) -> None:
    """Refuse an address with a password, wherever in the settings it stands."""
    if isinstance(value, (str, Path)):
        refuse_secrets(setting, str(value))
    elif isinstance(value, dict):
        for name, one in cast("dict[object, object]", value).items():
            _refuse_secrets(f"{setting}.{name}".lstrip("."), one)
    elif isinstance(value, (list, tuple)):
        for one in cast("Sequence[object]", value):
            _refuse_secrets(setting, one)


def refuse_addresses(setting: str, value: object, places: Set[str]) -> None:
    """Refuse an address where a setting names a place of this machine; sources have their own."""
    if isinstance(value, dict):
        for name, one in cast("dict[str, object]", value).items():
            if name not in ("sources", "validation"):
                refuse_addresses(f"{setting}.{name}".lstrip("."), one, places)
    elif setting.rpartition(".")[2] in places:
        for one in cast("Sequence[object]", value if isinstance(value, (list, tuple)) else [value]):
            refuse_address(setting, str(one))


def with_switches(kind: type[Any], argv: Sequence[str]) -> list[str]:
    """`--decode` without a value means true; `--decode false` stays what it is."""
    switches = {f"--{item.name}" for item in fields(kind) if item.type in ("bool", bool)}
    words = [*argv, "--"]
    return [
        f"{word}=true" if word in switches and after.startswith("--") else word
        for word, after in pairwise(words)
    ]


def run(main: Callable[[], int]) -> None:
    """Run a pipeline's main; a user's mistake becomes one line and exit code 2, a warning one.

    So do errors of permissions, disks and servers; any other error keeps its traceback. SIGTERM
    (`kill`, `ray job stop`, Slurm) is taken as Ctrl-C. A closed pipe ends the command silently,
    with the exit code of SIGPIPE.
    """
    signal.signal(signal.SIGTERM, partial(_interrupt, os.getpid()))
    warnings.formatwarning = warning_line
    sys.excepthook = _spelt_traceback
    with safe_output():
        code = _exit_code(main)
    sys.exit(code)


def _interrupt(command: int, number: int, frame: FrameType | None) -> None:
    """Raise as Ctrl-C does; a process forked from the command ends as by default."""
    del frame
    if os.getpid() == command:
        raise KeyboardInterrupt
    os._exit(128 + number)


def _exit_code(main: Callable[[], int]) -> int:
    try:
        code = main()
        flush_output()
    except (DataError, ModelError, TrainError, UsageError) as error:
        return _mistake(str(error))
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _mistake(missing_extra(Path(sys.argv[0]).stem, package))
    except Exception as error:
        found = system_error(error)
        if found is None or (line := blame(found)) is None:
            raise
        return _mistake(line)
    except KeyboardInterrupt as stopped:
        where = f"{stopped}; " if str(stopped) else ""
        print(f"interrupted; {where}run the same command again to go on", file=sys.stderr)
        return 130
    return code


def missing_extra(verb: str, package: str) -> str:
    """The line for a package that a verb needs and this install lacks."""
    extra = EXTRAS[package]
    return (
        f"{verb} needs the extra {extra} ({package} is not installed); "
        f"run pip install 'lapilli[{extra}]'"
    )


def _mistake(line: str) -> int:
    print(f"error: {hide_secrets(_short(line))}", file=sys.stderr)
    return USERS_MISTAKE


def _spelt_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(spell_out("".join(traceback.format_exception(kind, error, trace))))


def _short(text: str) -> str:
    """A message as one line; of a long one, which has a value of a file in it, both ends."""
    line = " ".join(text.split())
    if len(line) <= LONGEST_MISTAKE:
        return line
    return f"{line[: LONGEST_MISTAKE - 300]} ... {line[-300:]}"


def warning_line(message: Warning | str, *where: object, **line: object) -> str:
    """Format a warning without the line of code."""
    del where, line
    return f"warning: {hide_secrets(' '.join(str(message).split()))}\n"


def say(text: str) -> None:
    """Print one line, without markup. Leading newlines are empty lines."""
    line = text.lstrip("\n")
    say_text("\n" * (len(text) - len(line)) + one_line(line))


def say_text(text: str) -> None:
    """Print text of several lines, without markup."""
    console.print(text, markup=False, soft_wrap=True)


def stream_text(piece: str) -> None:
    """Print a piece of streamed text, without a newline."""
    sys.stdout.write(spell_out(piece))
    sys.stdout.flush()


def say_title(text: str) -> None:
    """Print the title of a phase."""
    console.print(f"\n{one_line(text)}", style="bold", markup=False)


class FieldsColumn(ProgressColumn):
    """As many of a task's `fields`, the most important first, as fit beside the other columns."""

    def __init__(self, width: int) -> None:
        """For columns that take `width` cells beside the task's description and counts."""
        super().__init__()
        self._width = width

    def render(self, task: Task) -> Text:
        """The fields that fit whole."""
        total = int(task.total or 0)
        used = self._width + cell_len(task.description) + 2 * len(str(total))
        line = ""
        for field in task.fields["fields"]:
            longer = f"{line}, {field}" if line else field
            if used + cell_len(longer) > console.width:
                break
            line = longer
        return Text(line, no_wrap=True)


def progress_bar(*, fields: bool = False) -> Progress:
    """A progress bar with counts and time to go; prints nothing but its last state to a file.

    Args:
        fields: Its tasks have `fields`, a list of texts that are shown as far as the line is wide.
    """
    bar = 10 if fields else 20
    width = 2 + 1 + bar + 1 + 1 + 1 + len("ETA") + 1 + len("0:00:00") + 1
    return Progress(
        TextColumn("  {task.description}"),
        BarColumn(bar),
        MofNCompleteColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        *([FieldsColumn(width)] if fields else []),
        console=console,
    )
