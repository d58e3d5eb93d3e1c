"""Make `docs/llava_flags.md` of the table of flags: `python -m tests.docs.flags_page`."""

from __future__ import annotations

from itertools import groupby

from pipelines.launch_scripts.flag_table import Flag, llava_flags
from tests.docs.pages import DOCS

__all__ = ["PATH", "page"]

PATH = DOCS / "llava_flags.md"
TITLES = {"transformers": "transformers.TrainingArguments"}
HEAD = """# LLaVA's flags

What a flag of LLaVA's trainer is called here. The flags are those of [{repository}]({address}) at
commit `{commit}`, with transformers {transformers}. `lapilli import-flags` applies this table to a
script:

```text
lapilli import-flags scripts/v1_5/finetune.sh --output recipes/finetune
```

It writes `recipes/finetune/data.yaml` for `preprocess` and `recipes/finetune/train.yaml` for
`train`, and prints a line per flag. Nothing of the script is executed: values of variables that it
does not set are given as `--variables '{{MODEL_VERSION: vicuna-7b-v1.5}}'`, the number of GPUs as
`--num_workers`. An unknown flag, a value of another type, or one that is not supported is one line,
and no recipe is written.

The recipes train the same parts on the same records at the same rates. LLaVA's own order of
records, mean of means and text mistakes are two more layers: `--config llava15/compat_data` for
`preprocess` and `--config llava15/compat` for `train`
([what is equal then](../pipelines/recipes/llava15/README.md)).

A flag that a script leaves out has LLaVA's default, which counts: without
`--mm_vision_select_layer` the last layer's features are taken.
"""


def page() -> str:
    """The whole page."""
    table = llava_flags()
    address = f"https://github.com/{table.repository}/tree/{table.commit}"
    lines = [
        HEAD.format(
            repository=table.repository, address=address, commit=table.commit[:8],
            transformers=table.transformers,
        )
    ]  # fmt: skip
    for group, flags in groupby(table.flags.values(), lambda flag: flag.of):
        lines += [
            f"\n## {TITLES.get(group, group)}\n",
            "| flag | default | here |",
            "|---|---|---|",
        ]
        lines += [f"| `--{f.name}` | {_shown(f.default)} | {_here(f)} |" for f in flags]
    return "\n".join(lines) + "\n"


def _here(flag: Flag) -> str:
    if flag.implied:
        return f"always so: {flag.implied}"
    if flag.ignored:
        return f"not needed: {flag.ignored}"
    if flag.unsupported:
        return f"not supported: {flag.unsupported}"
    where = f"`{flag.train}`" if flag.train else f"`{flag.data}` of the data recipe"
    renamed = {theirs: ours for theirs, ours in flag.values.items() if theirs != ours}
    names = ", ".join(f"{_plain(theirs)} is `{ours}`" for theirs, ours in renamed.items())
    return ": ".join(filter(None, [where, flag.how, names]))


def _shown(value: object) -> str:
    return "" if value in (None, "") else f"`{_plain(value)}`"


def _plain(value: object) -> str:
    return str(value)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    print(f"written: {PATH}")
