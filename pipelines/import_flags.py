"""Read a script that starts LLaVA's trainer, and write the recipes that train as it does.

lapilli import-flags scripts/v1_5/finetune.sh --output recipes/finetune
lapilli import-flags llava1_5_lora_sft.yaml --output recipes/lora --folder LLaMA-Factory

Writes FOLDER/data.yaml and FOLDER/train.yaml, and says of every flag what became of it. Nothing of
the script is executed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from lapilli.data.io.access import require_writable
from lapilli.data.io.atomic import write_text
from lapilli.data.io.whole_file import read_whole
from pipelines.cli.command import UsageError, first_as, parse, run, say
from pipelines.launch_scripts.flag_table import FlagTable, llava_flags
from pipelines.launch_scripts.mapping import Recipes, find_table, map_launch
from pipelines.launch_scripts.settings_file import read_settings, settings_of_file
from pipelines.launch_scripts.shell import Launch, parse_script

__all__ = ["ImportConfig", "import_flags", "main"]


@dataclass(frozen=True)
class ImportConfig:
    """The script and the recipes of `import-flags`.

    Attributes:
        script: A shell script with one command that starts LLaVA's trainer by deepspeed, torchrun,
            accelerate or python, `swift sft` or `llamafactory-cli train`; or a file of settings of
            ms-swift or LLaMA-Factory.
        output: Folder for `data.yaml` and `train.yaml`.
        variables: Values of the script's variables, which win over its own
            (`{MODEL_VERSION: vicuna-7b-v1.3}`).
        num_workers: GPUs, where the script does not say; 0 takes 8, as LLaVA's scripts do, and 1
            with a file of settings.
        folder: Where the script is started; its DeepSpeed file is looked for there.
        trainer: Whose flags they are: `llava`, `visper_lm`, `visper_lm_pretrain`, `gaudi_llava`,
            `basic_vlm`, `llama_factory` or `ms_swift`; `auto` finds it by command and flags.
        leave_out: Flags that are not supported, which the recipe shall be without
            (`[attn_mask_type]`: trains with a causal mask).
    """

    script: str
    output: str
    variables: dict[str, str] = field(default_factory=dict[str, str])
    num_workers: int = 0
    folder: str = "."
    trainer: str = "auto"
    leave_out: tuple[str, ...] = ()


def import_flags(config: ImportConfig) -> Recipes:
    """Write the recipes, and say what became of each flag.

    Raises:
        UsageError: The script cannot be parsed, a flag is unknown or not supported, or a recipe is
            there already.
    """
    try:
        text = read_whole(Path(config.script)).decode()
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError) as error:
        raise UsageError(f"script: {config.script} is no shell script ({error})") from None
    try:
        launch = _read(text, config)
        made = map_launch(
            launch, Path(config.folder), processes=config.num_workers, trainer=config.trainer,
            leave_out=config.leave_out,
        )  # fmt: skip
        table = find_table(launch, config.trainer)
    except UsageError as error:
        raise UsageError(f"{config.script}: {error}") from None
    output = Path(config.output)
    files = {"data.yaml": made.data, "train.yaml": made.train}
    if there := next((name for name in files if (output / name).exists()), ""):
        raise UsageError(f"output: {output / there} exists; remove it, or choose another --output")
    require_writable("output", output)
    output.mkdir(parents=True, exist_ok=True)
    for name, settings in files.items():
        write_text(output / name, _text(config.script, table, settings))
    return made


def _read(text: str, config: ImportConfig) -> Launch:
    """The command of a script with its file of settings, or such a file alone."""
    settings = read_settings(text)
    if settings is None:
        launch = parse_script(text, config.variables)
        return settings_of_file(launch, Path(config.folder)) if launch.file else launch
    launch = Launch(flags=settings, processes=0)
    if config.trainer == "auto" and find_table(launch) is llava_flags():
        raise UsageError(
            "settings of neither LLaMA-Factory nor ms-swift, by names such as finetuning_type or "
            "tuner_type; say --trainer, or name a script"
        )
    return launch


def _text(script: str, table: FlagTable, settings: dict[str, Any]) -> str:
    return (
        f"# Imported from {Path(script).name}, flags of {table.repository} at {table.commit[:8]}.\n"
        + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    )


def print_imported(config: ImportConfig, made: Recipes) -> None:
    """Print a line per flag, and the commands that come next."""
    width = max(len(f"--{name} {value}") for name, value, _ in made.rows)
    for name, value, fate in made.rows:
        say(f"{f'--{name} {value}':<{width}}  {fate}")
    recipes, output = quote(config.output), quote(made.output or "RUN")
    say(
        f"\nlapilli preprocess --config {recipes}/data.yaml --root {quote(config.folder)} "
        "--output DATASET"
    )
    train = f"lapilli train --config {recipes}/train.yaml --dataset DATASET --output {output}"
    if made.start:
        folder = Path(made.start).name
        say(f"hf download {made.start} --local-dir {folder}")
        train = f"{train} --init_from {folder}"
    say(train)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(ImportConfig, first_as("script", argv), "Recipes of a LLaVA training script.")
    print_imported(config, import_flags(config))
    return 0


if __name__ == "__main__":
    run(main)
