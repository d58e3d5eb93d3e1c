"""Kinds of repaired keys, and repairs that contradict each other.

Every repair is listed and counted. If two keys of a source that differ in more than case lead to
one file, neither is repaired; a key that is the file's own name stays.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice

import pyarrow as pa

from lapilli.data.mounts.names import composed, split_name
from lapilli.data.record import Reason, Verdict, excerpt

__all__ = [
    "EXACT",
    "REPAIRS_SCHEMA",
    "Repair",
    "contradictions",
    "folded",
    "kind_of",
    "repairs_table",
    "worse",
]

# From the least to the most. `archive`: an archive was read in the folder's place.
KINDS = (
    "", "archive", "normal_form", "absolute", "backslash", "percent", "white_space", "code_page",
    "annotation_folder", "case", "extension", "alias",
)  # fmt: skip
# With these a key names its file exactly, once it is decoded.
EXACT = frozenset(KINDS) - {"case", "extension", "alias"}

PACKED = re.compile(r"\.(zip|tar)/")  # where a path goes on inside an archive
ROWS = 8192  # of a part of the table
REPAIRS_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("key", pa.string()),
        ("file", pa.string()),  # the image's identity: container and member, links followed
        ("kind", pa.string()),
        ("times", pa.int64()),  # how many images of records have this key
    ]
)


@dataclass(slots=True)
class Repair:
    """How one key was read.

    Attributes:
        file: Path of the file as it is spelt, links not followed.
        name: The path that the key means, decoded and case folded.
        kind: One of `KINDS`.
        times: How often the key was asked for.
    """

    file: str
    name: str
    kind: str
    times: int = 0

    @property
    def is_exact(self) -> bool:
        """Whether the key, once decoded, is the file's own name."""
        if self.kind != "archive":
            return self.kind in EXACT
        above, inner = PACKED.split(f"/{folded(self.file)}", maxsplit=1)[::2]
        folder = above.rpartition("/")[0]
        return any(f"{own}/{inner}".endswith(f"/{self.name}") for own in (above, folder))


def worse(one: str, other: str) -> str:
    """The repair of two that changes more."""
    return max(one, other, key=KINDS.index)


def folded(path: str) -> str:
    """A path in one case and one normal form."""
    return composed(composed(path).casefold())


def kind_of(key: str, name: str) -> str:
    """How `name`, another spelling of the name `key`, differs from it."""
    if key == name:
        return ""
    if composed(key) == composed(name):
        return "normal_form"
    if folded(key) == folded(name):
        return "case"
    return "extension" if folded(split_name(key)[0]) == folded(split_name(name)[0]) else "alias"


def contradictions(
    repairs: Mapping[str, Repair], exact: Iterable[tuple[str, str, str]]
) -> dict[str, Verdict]:
    """Verdicts on the keys that cannot all mean the file they would be read from, by key.

    Args:
        repairs: The repaired keys.
        exact: Key, file and folded path of the keys that needed no repair; those of the files
            that repaired keys were read from are enough.
    """
    meant: dict[str, dict[str, str]] = {}  # file to the names that keys mean, with a key of each
    named: dict[str, set[str]] = {}  # the file's own names among them
    for key, file, name in exact:
        meant.setdefault(file, {}).setdefault(name, key)
        named.setdefault(file, set()).add(name)
    for key, repair in repairs.items():
        meant.setdefault(repair.file, {}).setdefault(repair.name, key)
        if repair.is_exact:
            named.setdefault(repair.file, set()).add(repair.name)
    found: dict[str, Verdict] = {}
    for key, repair in repairs.items():
        # The file's own name, in folders spelt otherwise, is not another name.
        own = {name.rpartition("/")[2] for name in named.get(repair.file, ())}
        if repair.name.rpartition("/")[2] in own:
            continue
        others = [other for name, other in meant[repair.file].items() if name != repair.name]
        if others:
            found[key] = Verdict(
                Reason.AMBIGUOUS_IMAGE,
                f"'{excerpt(key)}' and '{excerpt(others[0])}' would both be read from "
                f"'{excerpt(repair.file)}'; use the file's exact name",
            )
    return found


def repairs_table(source: str, rows: Iterable[tuple[str, str, str, int]]) -> pa.Table:
    """A source's part of `repairs.parquet`, of keys, files, kinds and times."""
    made: list[pa.RecordBatch] = []
    left = iter(rows)
    while part := list(islice(left, ROWS)):
        columns = [[source] * len(part), *map(list, zip(*part, strict=True))]
        arrays = [pa.array(c, f.type) for c, f in zip(columns, REPAIRS_SCHEMA, strict=True)]
        made.append(pa.record_batch(arrays, schema=REPAIRS_SCHEMA))
    return pa.Table.from_batches(made, REPAIRS_SCHEMA)
