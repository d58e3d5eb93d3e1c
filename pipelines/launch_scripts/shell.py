"""Parse a launch script, executing nothing: comments, variables, continued lines, one command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from pipelines.cli.command import UsageError

__all__ = ["LIST", "Launch", "parse_script"]

LIST = "\n"
"""Stands between the values of a flag that has several."""

FRAMEWORKS = {"swift": "sft", "llamafactory-cli": "train"}  # and the only command that is read
LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "python", "python3", "srun", *FRAMEWORKS)
ASSIGNMENT = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
VARIABLE = re.compile(r"\$(?:\{(\w+)(?::?-([^}]*))?\}|(\w+))")
# Files that start the trainer's file, which comes after them.
SPAWNERS = ("gaudi_spawn.py", "xla_spawn.py")
# Flags of launchers that say how many processes there are on a machine, and how many machines.
PROCESSES = ("num_gpus", "nproc_per_node", "nproc-per-node", "num_processes", "world_size")
MACHINES = ("num_nodes", "nnodes")
ENDS = (";", "&", "&&", "|")
DEVICES = ("CUDA_VISIBLE_DEVICES", "HABANA_VISIBLE_MODULES")


@dataclass(frozen=True)
class Launch:
    """The command of a script.

    Attributes:
        flags: The trainer's flags as they are written, without dashes; one without a value is
            `True`. The last of several counts.
        processes: What the launcher starts, over all machines; 0 where the script does not say.
        program: The words before the trainer's flags.
        launcher: The launcher's own flags.
        environment: Variables that the script sets.
        file: A file of settings that the command names; the flags win over it.
    """

    flags: dict[str, str]
    processes: int
    program: str = field(default="", compare=False)
    launcher: dict[str, str] = field(default_factory=dict[str, str], compare=False)
    environment: dict[str, str] = field(default_factory=dict[str, str], compare=False)
    file: str = field(default="", compare=False)

    def with_flags(self, flags: dict[str, str]) -> Launch:
        """The same command with other flags."""
        return replace(self, flags=flags)


def parse_script(text: str, variables: Mapping[str, str]) -> Launch:
    """The one command of a script that starts a trainer.

    Args:
        text: The script.
        variables: Values that win over the script's own.

    Raises:
        UsageError: No such command or several, a variable without a value, a substitution by a
            command, a quote that does not end, or a word that is no flag.
    """
    known: dict[str, str] = {}
    launches: list[list[str]] = []
    for line in _lines(text):
        if found := ASSIGNMENT.fullmatch(line.strip()):
            words = _words(found[2], known, variables)
            if len(words) <= 1:
                known[found[1]] = words[0] if words else ""
                continue
        words = _words(line, known, variables, whole=_starts(line))
        while words and ASSIGNMENT.fullmatch(words[0]):
            name, _, value = words.pop(0).partition("=")
            known[name] = value
        if words and words[0].rpartition("/")[2] in LAUNCHERS:
            launches.append(words)
    if len(launches) != 1:
        raise UsageError(
            f"{len(launches)} commands begin with one of {', '.join(LAUNCHERS)}; expected one"
        )
    chosen = {**known, **variables}
    devices = next((chosen[name] for name in DEVICES if chosen.get(name)), "")
    words = launches[0]
    is_framework = words[0].rpartition("/")[2] in FRAMEWORKS
    found = _framework(words, chosen, devices) if is_framework else _launch(words, devices)
    return replace(found, environment=chosen)


def _starts(line: str) -> bool:
    """Whether a line is a command that is read, and its variables must have values."""
    return any(word.rpartition("/")[2] in LAUNCHERS for word in line.split()[:6])


def _lines(text: str) -> Iterator[str]:
    """Logical lines: continued ones joined, comments and empty ones left out."""
    for line in re.sub(r"\\\r?\n", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def _words(
    line: str, known: Mapping[str, str], variables: Mapping[str, str], *, whole: bool = False
) -> list[str]:
    """A line's words, its variables replaced."""

    def value(found: re.Match[str]) -> str:
        name = found[1] or found[3]
        if name in variables:
            return variables[name]
        if name in known:
            return known[name]
        if found[2] is not None:
            return found[2]
        if whole:
            raise UsageError(
                f"${name} has no value in the script; give one: --variables '{{{name}: VALUE}}'"
            )
        return ""

    if whole and ("$(" in line or "`" in line):
        raise UsageError(
            "the command holds $(...) or a backquote, which is not executed; write its value"
        )
    try:
        return shlex.split(VARIABLE.sub(value, line), comments=True)
    except ValueError as error:
        if whole:
            raise UsageError(f"the command cannot be parsed ({error}): {line[:80]!r}") from None
        return []


def _launch(words: list[str], devices: str) -> Launch:
    """Split a command at the trainer's file or module, and read what is on both sides."""
    place = next((n for n, word in enumerate(words) if _is_program(word)), None)
    if place is None and "-m" in words:  # python -m torch.distributed.launch train.py, or a module
        place = len(words) - 1 - words[::-1].index("-m") + 1
    if place is None:
        raise UsageError(f"{words[0]}: the command names no file.py and no -m MODULE; expected one")
    before = _flags([word for word in words[1:place] if not word.endswith(".py")], strict=False)
    count = next((before[name] for name in PROCESSES if name in before), "")
    machines = next((before[name] for name in MACHINES if name in before), "1")
    if "exclude" in before:
        raise UsageError(
            f"{words[0]} --exclude {before['exclude']}: how many devices are left is not known "
            "here; write --include, or --num_gpus"
        )
    per_machine = "num_processes" not in before  # accelerate counts all of them
    if not count and (listed := before.get("include") or before.get("gpu_ids") or devices):
        count = str(_devices(listed))
        per_machine = "@" not in listed
    for name, text in (("processes", count or "0"), ("machines", machines)):
        if not text.isdecimal():
            raise UsageError(f"{words[0]}: {text!r} {name}; expected a whole number")
    return Launch(
        flags=_flags(words[place + 1 :], strict=True),
        processes=int(count or 0) * (int(machines) if per_machine else 1),
        program=" ".join(words[: place + 1]),
        launcher=before,
    )


def _framework(words: list[str], environment: Mapping[str, str], devices: str) -> Launch:
    """A command of LLaMA-Factory or ms-swift, which counts its processes by the environment."""
    name = words[0].rpartition("/")[2]
    if words[1:2] != [FRAMEWORKS[name]]:
        raise UsageError(
            f"{' '.join(words[:2])}: not supported; expected {name} {FRAMEWORKS[name]}"
        )
    rest = [f"--{word}" if re.match(r"[a-z_]+=", word) else word for word in words[2:]]
    file = rest.pop(0) if rest and not rest[0].startswith("-") else ""
    counts = [environment.get(one, "") for one in ("NPROC_PER_NODE", "NNODES")]
    if bad := next((text for text in counts if text and not text.isdecimal()), ""):
        raise UsageError(f"{name}: {bad!r} processes or machines; expected a whole number")
    every = _devices(devices) if devices and name != "swift" else 1
    return Launch(
        flags=_flags(rest, strict=True, several=True),
        processes=int(counts[0] or every) * int(counts[1] or 1),
        program=f"{name} {FRAMEWORKS[name]}",
        file=file,
    )


def _is_program(word: str) -> bool:
    return word.endswith(".py") and word.rpartition("/")[2] not in SPAWNERS


def _devices(listed: str) -> int:
    """Devices of `0,1`, of `localhost:0,1`, or of `host-0:0,1@host-1:0`."""
    return sum(len(host.rpartition(":")[2].split(",")) for host in listed.split("@"))


def _flags(words: list[str], *, strict: bool, several: bool = False) -> dict[str, str]:
    """`--name value`, `--name=value`, `--name`, and with `several` `--name value value`."""
    found: dict[str, str] = {}
    name = last = ""
    for word in words:
        if re.match(r"--?[A-Za-z]", word):
            name, has_value, value = word.lstrip("-").partition("=")
            found[name] = value if has_value else "True"
            name, last = "" if has_value else name, name
        elif name:
            found[name], name = word, ""
        elif several and last and word not in ENDS:
            found[last] += LIST + word
        elif strict and word not in ENDS:
            raise UsageError(f"{word!r} stands where a flag is expected; quote values with spaces")
        elif strict:
            break
    return found
