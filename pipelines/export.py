"""Export a dataset or a trained model for other tools.

lapilli export --to webdataset --dataset datasets/finetune --output shards/finetune
lapilli export runs/finetune --to hf --output exports/finetune --dtype bfloat16
lapilli export runs/lora --to peft --output exports/lora
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from lapilli.data.cluster.places import check_places
from lapilli.data.cluster.probe import JobPlaces
from lapilli.data.dataset.build_settings import read_build_config
from lapilli.data.dataset.export_webdataset import export_webdataset
from lapilli.data.errors import DataError
from lapilli.data.io.access import is_folder
from lapilli.data.io.remote_path import open_output
from lapilli.data.io.writer_lock import only_writer
from lapilli.data.shards.manifest import template_fingerprint
from lapilli.data.sources.root_address import moved_root
from lapilli.data.text.encode import tokenizer_facts
from lapilli.data.text.export_template import TrainedEnd, export_obstacle, export_text
from lapilli.data.text.tokenizer_files import load_tokenizer
from lapilli.model.interop.hf import Preprocessing, write_hf, write_processor
from lapilli.model.interop.hf_files import oldest_reader
from lapilli.train.checkpoint.at_hand import local_run
from pipelines.cli.command import first_as, parse, progress_bar, run, say
from pipelines.exports.basic_vlm import to_basic_vlm
from pipelines.exports.config import ExportConfig
from pipelines.exports.llava import to_llava, to_peft
from pipelines.exports.output import (
    filled,
    open_run,
    stored,
    tokenizer_bytes,
    weight_bytes,
    writing_progress,
)
from pipelines.reports.cards import CARD, model_card


def to_webdataset(config: ExportConfig) -> None:
    """Write tars and print how many samples they hold."""
    if not config.dataset:
        raise DataError("dataset: nothing named; pass --dataset with a dataset's folder")
    dataset, output = open_output(config.dataset), open_output(config.output)
    build = read_build_config(dataset, config.trust)
    build = moved_root(build, config.root) if config.root else build
    if not is_folder(root := Path(build.root)):
        raise DataError(f"root: folder {root} does not exist; pass --root with the data's folder")
    if not isinstance(output, Path):
        check_places(JobPlaces({}, {}, {"output": config.output}), build.build)
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
    asked = open_run(config.run, Path(config.output), config.trust)
    if obstacle := export_obstacle(asked.template, asked.tokenizer):
        raise DataError(f"{obstacle}; the run itself can be asked")
    exported = export_text(asked.template, asked.tokenizer)
    learnt = tokenizer_facts(asked.tokenizer)
    dtype: torch.dtype = getattr(torch, config.dtype)
    needed = weight_bytes(asked.model, dtype.itemsize) + tokenizer_bytes(asked.tokenizer)
    with filled(Path(config.output), needed) as folder:
        how = Preprocessing(asked.spec.size, asked.spec.aspect, asked.spec.colour)
        notes = write_processor(asked.model, how, folder) + _notes_of_end(exported.end)
        exported.write(folder)
        facts = {
            "template": asdict(exported.template),
            "view": asked.spec.facts(),
            "tokenizer": asdict(tokenizer_facts(load_tokenizer(folder))),
            "trained": {
                "tokenizer": learnt.fingerprint,
                "special_ids": [learnt.bos_id, learnt.eos_id],
                "template": template_fingerprint(asked.template),
                "template_name": asked.template.name,
            },
        }
        with writing_progress() as on_progress:
            write_hf(
                asked.model,
                folder,
                image_token_id=exported.image_id,
                end_ids=exported.end_ids,
                pad_id=exported.token_id("pad"),
                bos_id=exported.token_id("bos"),
                dtype=dtype,
                facts=facts,
                shard_size=config.shard_size,
                on_progress=on_progress,
            )
        readers = f"transformers {oldest_reader(asked.model)} and newer"
        card = model_card(
            Path(config.run), asked.name, library="transformers", relation="finetune",
            usage=_usage(readers, notes),
        )  # fmt: skip
        (folder / CARD).write_text(card, encoding="utf-8")
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


def _usage(readers: str, notes: Sequence[str]) -> str:
    """What a user of the folder has to know."""
    lines = [
        f"For {readers}:", "", "```python",
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
    return "\n".join(lines).rstrip()


FORMS: dict[str, Callable[[ExportConfig], None]] = {
    "webdataset": to_webdataset,
    "hf": to_hf,
    "llava": to_llava,
    "peft": to_peft,
    "basic_vlm": to_basic_vlm,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    config = parse(
        ExportConfig, first_as("run", argv), "Write a dataset or a trained model in another form.",
        addresses=["output", "dataset", "root"], copied={"run": local_run},
    )  # fmt: skip
    if config.to not in FORMS:
        raise DataError(f"to: {config.to!r} is no form; expected one of {', '.join(FORMS)}")
    if config.to == "webdataset":  # which goes on with the tars that are there
        to_webdataset(config)
        return 0
    with stored(config.output) as output, only_writer(Path(output), "written", beside=True):
        FORMS[config.to](replace(config, output=output))
    return 0


if __name__ == "__main__":
    run(main)
