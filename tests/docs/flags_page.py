"""Make `docs/llava_flags.md` of the tables of flags: `python -m tests.docs.flags_page`."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from pipelines.launch_scripts.flag_table import TRAINERS, Flag, FlagTable, flag_table, llava_flags
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

Scripts of VisPer-LM, of Intel's example for Gaudi and of Basic-VLM are recognised by their
command; `--trainer gaudi_llava` says it. What their trainers have beside LLaVA's flags is
[below](#other-trainers). What trains otherwise without a flag is an error;
`--leave_out` with names of such flags makes the recipe without them.

Settings of LLaMA-Factory and ms-swift for supervised training of LLaVA 1.5 are read too, from their
YAML or from a script with `llamafactory-cli train` or `swift sft`:

```text
lapilli import-flags llava1_5_lora_sft.yaml --output recipes/lora --folder LLaMA-Factory
```

`--folder` is where the command is started, below which `data/dataset_info.json` and data files lie.
A YAML does not say how many GPUs there are: one, or `--num_workers`. The model is downloaded, and
is where the run starts from; a model of another kind is refused.

The launcher may be `deepspeed`, `torchrun`, `accelerate`, `python` or `gaudi_spawn.py`. Processes
are counted from its flags, its device lists (`--include`, `--gpu_ids`, `CUDA_VISIBLE_DEVICES`) or
accelerate's `--config_file`. Of a DeepSpeed file the stage, offload, schedule and sizes of
collectives are taken; a number that is not its flag's is an error, as it is to transformers.
`WarmupLR` is `constant` after a linear rise.
"""
OTHERS = """
## Other trainers

What differs from LLaVA's flags. `code` is a value that no flag gives: the trainer's code fixes it.
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
        lines.append(f"\n## {TITLES.get(group, group)}\n")
        lines += _rows(flags)
    lines.append(OTHERS)
    for name in TRAINERS[1:]:
        lines += _other(name, flag_table(name))
    return "\n".join(lines) + "\n"


def _rows(flags: Iterable[Flag]) -> list[str]:
    rows = [
        f"| `{'' if f.is_fixed else '--'}{f.name}` | {_shown(f.default)} | {_here(f)} |"
        for f in flags
    ]
    return ["| flag | default | here |", "|---|---|---|", *rows]


def _other(name: str, table: FlagTable) -> list[str]:
    """The section of a trainer: its flags that another's table does not hold."""
    below = {
        id(flag)
        for one in TRAINERS[: TRAINERS.index(name)]
        for flag in flag_table(one).flags.values()
    }
    own = [flag for flag in table.flags.values() if id(flag) not in below]
    address = f"https://github.com/{table.repository}/tree/{table.commit}"
    where = f"`{name}`: [{table.repository}]({address}) at commit `{table.commit[:8]}`."
    title = table.title.removeprefix("the ")
    return [f"\n### {title[0].upper()}{title[1:]}\n", where, "", *_rows(own)]


def _here(flag: Flag) -> str:
    if flag.same_as:
        return f"LLaVA's `--{flag.same_as}`"
    if flag.implied:
        return f"always so: {flag.implied}"
    if flag.ignored:
        return f"not needed: {flag.ignored}"
    if flag.unsupported:
        return f"not supported: {flag.unsupported}"
    where = f"`{flag.train}`" if flag.train else f"`{flag.data}` of the data recipe"
    renamed = {theirs: ours for theirs, ours in flag.values.items() if theirs != ours}
    names = ", ".join(f"{_plain(theirs)} is `{ours}`" for theirs, ours in renamed.items())
    differs = flag.differs and f"differs: {flag.differs}"
    return ": ".join(filter(None, [where, flag.how, names, differs]))


def _shown(value: object) -> str:
    return "" if value in (None, "") else f"`{_plain(value)}`"


def _plain(value: object) -> str:
    return str(value)


if __name__ == "__main__":
    PATH.write_text(page(), encoding="utf-8")
    print(f"written: {PATH}")
