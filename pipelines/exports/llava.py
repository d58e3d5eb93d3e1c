"""Export a run as LLaVA's checkpoint, or its adapters for PEFT and LLaVA."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lapilli.data.errors import DataError
from lapilli.data.text.encode import tokenizer_facts
from lapilli.data.text.export_template import end_ids, trained_end
from lapilli.data.text.tokenizer_files import load_tokenizer
from lapilli.model.errors import ModelError
from lapilli.model.interop.foreign import BASE_FOLDER, MODEL, QUANTIZED
from lapilli.model.interop.hf import FACTS
from lapilli.model.interop.hf_files import base_end_ids, generation_text
from lapilli.model.interop.llava import (
    LEFT_OVER,
    LlavaForm,
    write_llava,
    write_llava_config,
    write_projector,
)
from lapilli.model.interop.llava_config import TOWER_FOLDER, check_llava
from lapilli.model.interop.llava_tower import (
    TowerImages,
    published_tower,
    tower_bytes,
    write_tower,
)
from lapilli.model.interop.lora_run import check_adapters, write_base, write_lora_run
from lapilli.model.interop.weights import adapted_layers
from lapilli.model.parts.added_rows import added_rows, source_rows
from lapilli.model.parts.pretrained import local_folder
from lapilli.model.parts.quantized import Quantization
from lapilli.model.parts.vision import FAMILIES
from lapilli.model.vlm import AUX_PARTS, VisionLanguageModel
from lapilli.train.checkpoint.init_from import keeps_language
from lapilli.train.inference.assistant import Assistant
from pipelines.cli.command import say
from pipelines.exports.config import ExportConfig
from pipelines.exports.output import (
    filled,
    open_run,
    tokenizer_bytes,
    weight_bytes,
    writing_progress,
)
from pipelines.exports.tokenizer import put_tokenizer, put_tokenizer_for_llava
from pipelines.reports.cards import CARD, model_card

__all__ = ["adapter_bytes", "facts_of", "made_of", "to_llava", "to_peft", "write_json_file"]

FP32 = 4
READS_NAMES = "LLaVA chooses its loader by the folder's name"


def to_llava(config: ExportConfig) -> None:
    """Write LLaVA's checkpoint with its tokenizer, and the projector by itself."""
    output = Path(config.output)
    asked = open_run(config.run, output, config.trust)
    check_llava(asked.model)
    form = _form(config, asked)
    size = form.dtype.itemsize
    parts = [asked.model.language, asked.model.projector, asked.model.projector]
    parts += [part for name, part in asked.model.named_children() if name in AUX_PARTS]
    needed = sum(weight_bytes(part, size) for part in parts) + tokenizer_bytes(asked.tokenizer)
    needed += 0 if form.tower else tower_bytes(asked.model, form.dtype)
    with filled(output, needed) as folder:
        reader = put_tokenizer_for_llava(asked.tokenizer, folder)
        with writing_progress() as on_progress:
            write_llava(asked.model, folder, form, on_progress)
        (folder / "generation_config.json").write_text(_generation(asked), encoding="utf-8")
        write_json_file(folder / FACTS, facts_of(asked))
        usage = "LLaVA's checkpoint: `load_pretrained_model` of `llava.model.builder` loads it."
        card = model_card(Path(config.run), asked.name, relation="finetune", usage=usage)
        (folder / CARD).write_text(card, encoding="utf-8")
        path = write_projector(asked.model, folder / "projector").relative_to(folder)
    say(f"{output}: LLaVA's layout; {output / path} for --pretrain_mm_mlp_adapter")
    if reader != "LlamaTokenizer":
        say(f"tokenizer: no SentencePiece model belongs to it; LLaVA reads it as {reader}")
    _say_tower(output, form.tower, asked)
    _say_name(output, asked, "llava")


def _form(config: ExportConfig, asked: Assistant) -> LlavaForm:
    images = TowerImages(asked.spec.size, asked.spec.aspect)
    return LlavaForm(
        images=images,
        place=Path(config.output),
        dtype=getattr(torch, config.dtype),
        shard_size=config.shard_size,
        files=config.files,
        tower=published_tower(asked.model, images),
    )


def facts_of(asked: Assistant) -> dict[str, Any]:
    """What the folder has no place for, for `generate`, `chat` and `evaluate`."""
    return {
        "template": asdict(asked.template),
        "view": asked.spec.facts(),
        "tokenizer": asdict(tokenizer_facts(asked.tokenizer)),
        "vocab_size": asked.model.vocab_size,
    }


def _generation(asked: Assistant) -> str:
    """Greedy answers that stop where training stopped, or where the base did."""
    config: Any = asked.model.language.config
    own = end_ids(trained_end(asked.template, asked.tokenizer), asked.tokenizer)
    ends = [*dict.fromkeys([*own, *base_end_ids(asked.model)])]
    return generation_text(ends, config.pad_token_id, config.bos_token_id)


def write_json_file(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object to be read by people too."""
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _say_tower(output: Path, tower: str, asked: Assistant) -> None:
    """What LLaVA will load as the tower, and where its images differ."""
    if not tower:
        place = (output / TOWER_FOLDER).absolute()
        say(f"{place}: the tower as trained; config.json names this place, change it after a move")
    mean = asked.model.config.vision.mean
    grey = tuple(int(255 * value) for value in mean or ())
    if asked.spec.aspect == "pad" and grey != asked.spec.colour:
        say(f"LLaVA pads images with {grey}, the run with {asked.spec.colour}")


def _say_name(output: Path, asked: Assistant, *words: str) -> None:
    kind = str(asked.model.language.config.model_type)
    by_kind = {"mistral": ["mistral"], "phi3": ["phi"]}.get(kind, [])
    wanted = [*words, *(by_kind if "lora" not in words else [])]
    missing = [word for word in wanted if word not in output.name.lower()]
    if missing:
        say(f"{READS_NAMES}: have {' and '.join(missing)} in it")


def to_peft(config: ExportConfig) -> None:
    """Write a run's adapters, what else learnt, and what LLaVA's loader wants beside them."""
    output = Path(config.output)
    asked = open_run(config.run, output, config.trust)
    model = asked.model
    check_adapters(model)
    adapts_language = bool(adapted_layers(model.language))
    base = model.config.language.pretrained if keeps_language(Path(config.run)) else ""
    writes_base = adapts_language and not base
    rows = 0 if writes_base or added_rows(model.language) is None else len(asked.tokenizer)
    form = _form(config, asked)
    images = form.images
    tower = form.tower or published_tower(model, images, for_llava=False)
    unfit = _unfit(asked, rows, adapts_language)
    if not unfit and not form.tower:
        tower = ""
    writes_tower = not tower and model.config.vision.tower in FAMILIES
    needed = adapter_bytes(model) + tokenizer_bytes(asked.tokenizer) * (2 if writes_base else 1)
    needed += weight_bytes(model.language, form.dtype.itemsize) if writes_base else 0
    needed += tower_bytes(model, form.dtype) if writes_tower else 0
    with filled(output, needed) as folder, writing_progress() as on_progress:
        place = str((output / BASE_FOLDER).absolute()) if writes_base else base
        found = write_lora_run(model, folder, base=place, rows=rows)
        if not unfit:
            write_llava_config(model, folder, form)
        elif writes_tower:
            write_tower(model, folder, images, form.dtype)
        put_tokenizer(asked.tokenizer, folder)
        if writes_base:
            (folder / BASE_FOLDER).mkdir()
            put_tokenizer_for_llava(asked.tokenizer, folder / BASE_FOLDER)
            write_base(
                model, folder, form.dtype, shard_size=config.shard_size, on_progress=on_progress
            )
        write_json_file(
            folder / FACTS, facts_of(asked) | made_of(model, rows, writes_base, writes_tower)
        )
        usage = "Adapters: `PeftModel.from_pretrained` loads them onto their base model."
        card = model_card(
            Path(config.run), asked.name, library="peft", relation="adapter", usage=usage
        )
        (folder / CARD).write_text(card, encoding="utf-8")
        places = [output / path.relative_to(folder) for path in found]
    for path in places:
        say(f"{path}: PeftModel.from_pretrained loads it onto its base model")
    _say_base(output, asked, base, rows, config.run)
    say(f"{output / LEFT_OVER}: the other trained weights; LLaVA's loader takes the whole folder")
    if unfit:
        say(f"no config.json for LLaVA's loader: {unfit}")
    else:
        _say_tower(output, form.tower, asked)
        _say_name(output, asked, "llava", "lora")


def adapter_bytes(model: VisionLanguageModel) -> int:
    """fp32, as it was trained; tables of a vocabulary that has grown are written whole."""
    learnt = sum(v.numel() for _, v in model.named_parameters() if v.requires_grad)
    projector = sum(v.numel() for v in model.projector.parameters() if not v.requires_grad)
    tables = 0
    if added_rows(model.language) is not None:
        both: tuple[Any, Any] = (
            model.language.get_input_embeddings().weight,
            model.language.get_output_embeddings().weight,
        )
        tables = sum(v.numel() for v in {id(v): v for v in both}.values())
    return FP32 * (learnt + projector + tables)


def _unfit(asked: Assistant, rows: int, adapts_language: bool) -> str:
    """Why LLaVA's loader of adapters cannot take the folder; empty if it can."""
    try:
        check_llava(asked.model)
    except ModelError as error:
        return str(error)
    if not adapts_language:
        return "the language model has no adapters; export with --to llava"
    if rows > source_rows(asked.model.language):
        return "it cannot give a base model more tokens; export with --to llava"
    return ""


def made_of(
    model: VisionLanguageModel, rows: int, writes_base: bool, writes_tower: bool
) -> dict[str, Any]:
    """What an export of adapters is put together of, for `generate`, `chat` and `evaluate`."""
    vision = model.config.vision
    if writes_tower:  # it is written up to that layer
        vision = replace(vision, vision_feature_layer=-1)
    quantized = model.config.language.quantize != "none" and not writes_base
    how = Quantization.of(model.config.language)
    size = max(rows, source_rows(model.language)) if rows else 0
    return {
        MODEL: {
            "vision": asdict(vision),
            "language": {"vocab_size": size},
            "projector": model.config.projector,
        },
        QUANTIZED: [model.config.dtype, how.kind, how.is_double] if quantized else "",
    }


def _say_base(output: Path, asked: Assistant, base: str, rows: int, run: str) -> None:
    config = asked.model.config.language
    if not base:
        why = "an earlier run trained it" if config.pretrained else "its weights were random"
        say(f"{output / BASE_FOLDER}: the base model of {run}, which lies nowhere else: {why}")
        return
    say(f"the base model is {base}, which is not in the export")
    if rows > source_rows(asked.model.language):
        say(f"grow it first: base.resize_token_embeddings({rows}); AutoPeftModel does so itself")
    if config.quantize != "none":
        is_double = config.double_quant and config.quantize != "int8"
        say(
            f"the run had it in {config.quantize}{', twice quantised' if is_double else ''}: load "
            "it so for the same answers, or export merged weights with --to hf"
        )
    folder = local_folder(base)
    try:
        its_own = load_tokenizer(folder) if folder else None
    except DataError:
        its_own = None
    ours = tokenizer_facts(asked.tokenizer).fingerprint
    if its_own is None or tokenizer_facts(its_own).fingerprint != ours:
        say("LLaVA takes the base model's tokenizer, which is another: copy this folder's there")
