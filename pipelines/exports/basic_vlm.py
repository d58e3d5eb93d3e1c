"""Export a run's adapters on a Qwen-1 as Basic-VLM's folder."""

from __future__ import annotations

from pathlib import Path

from lapilli.model.interop.basic_vlm import (
    OTHER_PARAMS,
    TOWER_NAME,
    check_basic_vlm,
    write_basic_vlm,
)
from lapilli.model.interop.hf import FACTS
from lapilli.model.interop.llava_config import TOWER_FOLDER
from lapilli.model.interop.llava_tower import (
    TowerImages,
    published_tower,
    tower_bytes,
    write_tower,
)
from lapilli.train.checkpoint.init_from import keeps_language
from lapilli.train.errors import TrainError
from pipelines.cli.command import say
from pipelines.exports.config import ExportConfig
from pipelines.exports.llava import adapter_bytes, facts_of, made_of, write_json_file
from pipelines.exports.output import filled, open_run, tokenizer_bytes
from pipelines.exports.tokenizer import put_tokenizer
from pipelines.reports.cards import CARD, model_card

__all__ = ["to_basic_vlm"]


def to_basic_vlm(config: ExportConfig) -> None:
    """Write adapters by a Qwen-1's own names, the projector, and a tower that is not published.

    Raises:
        TrainError, ModelError: A run that its files have no place for.
    """
    output = Path(config.output)
    asked = open_run(config.run, output, config.trust)
    model = asked.model
    check_basic_vlm(model)
    if not keeps_language(Path(config.run)):
        raise TrainError(
            f"run: {config.run} adapts a language model that an earlier run trained, which "
            "Basic-VLM's files have no place for; export with --to peft"
        )
    base = model.config.language.pretrained
    images = TowerImages(asked.spec.size, asked.spec.aspect)
    writes_tower = not published_tower(model, images, for_llava=False)
    needed = adapter_bytes(model) + tokenizer_bytes(asked.tokenizer)
    dtype = next(model.vision.parameters()).dtype
    needed += tower_bytes(model, dtype) if writes_tower else 0
    with filled(output, needed) as folder:
        write_basic_vlm(model, folder, base=base)
        if writes_tower:
            write_tower(model, folder, images, dtype)
        put_tokenizer(asked.tokenizer, folder)
        made = made_of(model, 0, writes_base=False, writes_tower=writes_tower)
        write_json_file(folder / FACTS, facts_of(asked) | made)
        usage = "Basic-VLM's files: its `test.py` and `webUI.py` load them beside the base model."
        card = model_card(Path(config.run), asked.name, relation="adapter", usage=usage)
        (folder / CARD).write_text(card, encoding="utf-8")
    say(
        f"{output}: adapters on {base}, which is not in the export; the projector is {OTHER_PARAMS}"
    )
    if writes_tower:
        place = output / TOWER_FOLDER
        say(f"{place}: the tower, which is none that is published as {TOWER_NAME} is")
