"""A dataset or a trained model in another form, for other tools.

python -m pipelines.export --to webdataset --dataset datasets/finetune --output shards/finetune
python -m pipelines.export runs/finetune --to hf --output exports/finetune --dtype bfloat16
python -m pipelines.export runs/lora --to peft --output exports/lora
"""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from lapilli.data.access import FULL, exists, is_denied, is_folder, naming, subpaths
from lapilli.data.config import BuildConfig
from lapilli.data.errors import DataError
from lapilli.data.export import export_webdataset
from lapilli.data.exported import TrainedEnd, export_obstacle, export_text
from lapilli.data.lock import only_writer
from lapilli.data.manifest import read_manifest
from lapilli.data.tokenize import tokenizer_facts
from lapilli.data.tokenizer_copy import write_copy
from lapilli.data.vocabulary import load_tokenizer
from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import FACTS, Preprocessing, write_hf, write_processor
from lapilli.model.interop.hf_files import oldest_reader
from lapilli.model.interop.llava import (
    LEFT_OVER,
    check_llava,
    write_llava,
    write_llava_config,
    write_projector,
)
from lapilli.model.interop.lora_run import write_lora_run
from lapilli.model.interop.weights import Progress
from lapilli.train.ask import Assistant, open_assistant
from lapilli.train.errors import TrainError
from lapilli.train.folders import CONFIG as RUN_CONFIG
from pipelines.command import first_as, parse, progress_bar, run, say
from pipelines.describe import bytes_text


@dataclass(frozen=True)
class ExportConfig:
    """What is written in which form.

    Attributes:
        to: `webdataset`: tars of the original images with the conversations as json, an epoch of
            each split. `hf`: a folder that transformers' LlavaForConditionalGeneration and its
            processor load. `llava`: LLaVA's checkpoint, and the projector as `mm_projector.bin`.
            Both have adapters merged into the weights. `peft`: the adapters by themselves, as
            PEFT and LLaVA load them, with whatever else learnt in `non_lora_trainables.bin`.
        output: Folder to write, by one process at a time; a model's must be empty or not there.
        run: Folder of a training run; its newest checkpoint is taken.
        dtype: Of a model's weights; an adapter's stay float32.
        shard_size: Most bytes in one file of weights, such as `5GB`.
        files: Form of `llava`'s weights: `safetensors`, or `bin`, which older programs read.
        dataset: Folder of a dataset.
        root: Folder of its annotations and images; empty for where it was made of.
        samples_per_tar: Samples in a tar.
    """

    to: str
    output: str
    run: str = ""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    shard_size: str = "5GB"
    files: Literal["safetensors", "bin"] = "safetensors"
    dataset: str = ""
    root: str = ""
    samples_per_tar: int = 10_000


def to_webdataset(config: ExportConfig) -> None:
    """Write tars and tell what came of it."""
    dataset, output = Path(config.dataset), Path(config.output)
    if not config.dataset:
        raise DataError("dataset: nothing named; pass --dataset with a dataset's folder")
    read_manifest(dataset)  # no dataset, no settings
    build = parse(BuildConfig, [f"--config={dataset / 'config.json'}"], "")
    root = Path(config.root or build.root)
    if not is_folder(root):
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    with progress_bar() as bar:
        task = bar.add_task("samples", total=None)
        report = export_webdataset(
            dataset,
            replace(build, root=str(root.resolve())),
            output,
            samples_per_tar=config.samples_per_tar,
            on_progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for split, samples in report.samples.items():
        if samples:
            say(f"{split}: {samples} samples in {output / split}-*.tar")
    say(f"{report.built} tars built, {report.reused} reused")


def to_hf(config: ExportConfig) -> None:
    """Write model and processor, once the processor is known to write the ids the model learnt."""
    asked = _open_run(config)
    if obstacle := export_obstacle(asked.template, asked.tokenizer):
        raise DataError(f"{obstacle}; the run itself can be asked")
    exported = export_text(asked.template, asked.tokenizer)
    with _filled(config, asked) as folder:
        how = Preprocessing(asked.spec.size, asked.spec.aspect, asked.spec.fill)
        notes = write_processor(asked.model, how, folder) + _notes_of_end(exported.end)
        exported.write(folder)
        facts = {
            "template": asdict(exported.template),
            "view": asked.spec.facts(),
            "tokenizer": asdict(tokenizer_facts(load_tokenizer(folder))),
        }
        with _told() as on_progress:
            write_hf(
                asked.model, folder, image_token_id=exported.image_id,
                end_ids=exported.end_ids,
                pad_id=exported.token_id("pad"), bos_id=exported.token_id("bos"),
                dtype=getattr(torch, config.dtype), facts=facts,
                shard_size=config.shard_size, on_progress=on_progress,
            )  # fmt: skip
        readers = f"transformers {oldest_reader(asked.model)} and newer"
        text = _readme(asked.name, readers, notes)
        (folder / "README.md").write_text(text, encoding="utf-8")
    say(f"{config.output}: LlavaForConditionalGeneration.from_pretrained and AutoProcessor load it")
    say(f"for {readers}")
    for note in notes:
        say(f"note: {note} (README.md there says it too)")


def _notes_of_end(end: TrainedEnd) -> list[str]:
    """What there is to say where no single id ends an answer."""
    if end.token_id is not None:
        return []
    if not end.text:
        return ["nothing ends an answer of this template; set max_new_tokens"]
    return [
        f"answers end with the text {end.text!r}, which no single token is; call generate with "
        f"stop_strings=[{end.text.strip() or end.text!r}] and the processor's tokenizer"
    ]


def _readme(name: str, readers: str, notes: Sequence[str]) -> str:
    """What a user of the folder has to know."""
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "",
        f"# {name}", "", f"For {readers}:", "", "```python",
        "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
        "processor = AutoProcessor.from_pretrained(folder)",
        "model = AutoModelForImageTextToText.from_pretrained(folder)",
        'question = {"type": "text", "text": "What is it?"}',
        'content = [{"type": "image", "path": "photo.jpg"}, question]',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True,',
        '    return_dict=True, return_tensors="pt",', ")",
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        "```", "",
        "The chat template writes the whole prompt, its first token included; the tokenizer adds",
        "nothing. A prompt written by hand begins with what the chat template begins with.", "",
        *(f"- {note[0].upper()}{note[1:]}." for note in notes),
    ]  # fmt: skip
    return "\n".join(lines).rstrip() + "\n"


def to_llava(config: ExportConfig) -> None:
    """Write LLaVA's checkpoint with its tokenizer, and the projector by itself."""
    asked, output = _open_run(config), Path(config.output)
    with _filled(config, asked) as folder:
        with _told() as on_progress:
            write_llava(
                asked.model, folder, dtype=getattr(torch, config.dtype), form=config.files,
                shard_size=config.shard_size, aspect=_aspect(asked), on_progress=on_progress,
            )  # fmt: skip
        _put_tokenizer(asked.tokenizer, folder)
        path = write_projector(asked.model, folder / "projector").relative_to(folder)
    say(f"{output}: LLaVA's layout; {output / path} for --pretrain_mm_mlp_adapter")


def to_peft(config: ExportConfig) -> None:
    """Write a run's adapters, what else learnt, and what LLaVA's loader wants beside them."""
    asked, output = _open_run(config), Path(config.output)
    base = _base(Path(config.run), asked)
    with _filled(config, asked) as folder:
        found = write_lora_run(asked.model, folder, base=base)
        try:
            check_llava(asked.model)
            write_llava_config(asked.model, folder, aspect=_aspect(asked))
        except ModelError as error:
            say(f"no config.json for LLaVA's loader: {error}")
        _put_tokenizer(asked.tokenizer, folder)
        places = [output / path.relative_to(folder) for path in found]
    for place in places:
        say(f"{place}: PeftModel.from_pretrained loads it onto its base model")
    say(f"{output / LEFT_OVER}: what learnt beside; LLaVA's loader takes the whole folder")
    if not base:
        say("the base model had no name: it was random, or an earlier run's; export that one too")


def _put_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer's own files beside a model's `config.json`, which stays the model's."""
    with tempfile.TemporaryDirectory(prefix="lapilli-") as made:
        write_copy(tokenizer, Path(made) / "tokenizer")
        for path in (Path(made) / "tokenizer").iterdir():
            if path.name != "config.json":
                shutil.copyfile(path, folder / path.name)


def _base(run: Path, asked: Assistant) -> str:
    """The language model below the adapters, where it has a name: not after an earlier run."""
    settings: dict[str, Any] = json.loads((run / RUN_CONFIG).read_text(encoding="utf-8"))
    return "" if settings["start_from"] else asked.model.config.language.pretrained


def _aspect(asked: Assistant) -> Literal["pad", "square"]:
    """How LLaVA calls it."""
    return "pad" if asked.spec.aspect == "pad" else "square"


@contextmanager
def _told() -> Generator[Progress]:
    """Show the bytes of weights that are written."""
    with progress_bar() as bar:
        task = bar.add_task("MB written", total=None)

        def on_progress(done: int, total: int) -> None:
            bar.update(task, completed=round(done / 1e6), total=round(total / 1e6))

        yield on_progress


@contextmanager
def _filled(config: ExportConfig, asked: Assistant) -> Generator[Path]:
    """A folder beside `output` to fill, which becomes it when all is there and goes if not.

    Raises:
        TrainError: There is no room for it, or it cannot be written.
    """
    output = Path(config.output)
    temporary = output.absolute().with_name(f".{output.name}.tmp")
    needed = _least_bytes(config, asked)
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
        temporary.mkdir(parents=True)
        if needed > shutil.disk_usage(temporary).free:  # before any weights are merged
            raise _no_room(output, needed)
        with naming(temporary):
            yield temporary
        if is_folder(output):
            output.rmdir()  # empty: `_open_run` has looked
        temporary.rename(output)
    except OSError as error:
        if error.errno in FULL:
            shutil.rmtree(temporary, ignore_errors=True)
            raise _no_room(output, needed, f": {error.strerror};") from None
        if is_denied(error) or error.errno == errno.ENOTEMPTY:
            raise TrainError(
                f"output: {output} cannot be written ({error.strerror}); choose another --output"
            ) from None
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _least_bytes(config: ExportConfig, asked: Assistant) -> int:
    """Bytes of the weights that are written; the tokenizer's files and a few settings come on top.

    A part that the form has no place for is counted too.
    """
    size = torch.finfo(getattr(torch, config.dtype)).bits // 8
    named = asked.model.named_parameters()
    if config.to == "peft":  # fp32, as it was trained
        return sum(4 * value.numel() for _, value in named if value.requires_grad)
    return sum(size * value.numel() for name, value in named if ".lora_" not in name)


def _no_room(output: Path, needed: int, why: str = "") -> TrainError:
    """The line for a disk that is too small; of a quota its free space says nothing, `why` does."""
    free = shutil.disk_usage(output.absolute().parent).free
    return TrainError(
        f"output: {output}{why} has {bytes_text(free)} free, the export needs "
        f"{bytes_text(needed)} and its tokenizer's files; free space or choose another --output"
    )


def _open_run(config: ExportConfig) -> Assistant:
    if not config.run:
        raise TrainError("run: nothing named; pass the folder of a training run")
    output = Path(config.output)
    if exists(output) and not is_folder(output):
        raise TrainError(f"output: {output} is a file; choose another name")
    if subpaths(output):
        raise TrainError(f"output: {output} is not empty; choose another folder")
    if exists(Path(config.run) / FACTS):
        raise TrainError(
            f"run: {config.run} is an export already; expected a training run's folder"
        )
    return open_assistant(Path(config.run))


FORMS: dict[str, Callable[[ExportConfig], None]] = {
    "webdataset": to_webdataset,
    "hf": to_hf,
    "llava": to_llava,
    "peft": to_peft,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        ExportConfig, first_as("run", argv), "Write a dataset or a trained model in another form."
    )
    if config.to not in FORMS:
        raise DataError(f"to: {config.to!r} is no form; expected one of {', '.join(FORMS)}")
    with only_writer(Path(config.output), "written", beside=True):
        FORMS[config.to](config)
    return 0


if __name__ == "__main__":
    run(main)
