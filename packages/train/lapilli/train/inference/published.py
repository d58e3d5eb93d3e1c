"""Open published models: their template and view come from the folder or the user.

Folders of transformers' LLaVA, of LLaVA's own code, and of adapters for either. What a folder does
not say is asked for by name and never guessed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from lapilli.data.dataset.tokenizer_copy import check_copy, kept_files
from lapilli.data.errors import DataError
from lapilli.data.images.view import ImageSpec
from lapilli.data.io.typed_json import JsonError, as_type, from_json
from lapilli.data.io.whole_file import MOST_JSON, read_whole, require_plain
from lapilli.data.io.yaml_text import UnusableYaml, load_yaml
from lapilli.data.record import Turn
from lapilli.data.shards.manifest import TokenizerFields, template_fingerprint
from lapilli.data.text.chat_template.bounded_jinja import BoundedTemplate
from lapilli.data.text.encode import tokenizer_facts
from lapilli.data.text.export_template import TRIALS, messages_of, prompt_ids
from lapilli.data.text.templates import TEMPLATES, TOKENIZERS_OWN, Template, get_template
from lapilli.data.text.tokenizer_files import has_vocabulary, load_tokenizer
from lapilli.model.interop.foreign import base_folder, kind_of, read_foreign
from lapilli.model.interop.hf import FACTS, read_facts
from lapilli.model.interop.llava_config import CONFIG, is_llava_config, read_config
from lapilli.model.interop.peft import SETTINGS, read_settings
from lapilli.model.vlm import VisionLanguageModel
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.checkpoint_state import TrainingData

__all__ = ["Published", "is_published", "published_data", "read_published", "read_view"]

IMAGE_TOKEN = "<image>"
ASPECTS = ("pad", "crop", "stretch")


@dataclass(frozen=True)
class Published:
    """What a folder holds.

    Attributes:
        model: The model.
        tokenizer: transformers' tokenizer.
        template: How conversations are written down; None where neither folder nor user says.
        spec: How images are made square; None likewise.
        is_own: Whether it is an export of ours, which says both as its run was trained.
        trained: Of an export whose tokenizer and template were rewritten: the fields of
            `TrainingData` that the run's own have.
    """

    model: VisionLanguageModel
    tokenizer: Any
    template: Template | None
    spec: ImageSpec | None
    is_own: bool
    trained: Mapping[str, Any] = field(default_factory=dict[str, Any])


def is_published(path: Path) -> bool:
    """Whether a folder is a model of others or an export, and no run's.

    Raises:
        ModelError: Its `config.json` cannot be read.
    """
    if not path.is_dir():
        return False
    return (path / SETTINGS).is_file() or "model_type" in read_config(path)


def read_published(path: Path, *, template: str = "", view: str = "") -> Published:
    """Read a folder; tokenizer, template and view before any weights.

    Args:
        path: The folder.
        template: Name or file of a template, for a folder that does not say.
        view: `pad`, `crop` or `stretch`, or fields of an `ImageSpec` as YAML; likewise.

    Raises:
        DataError, ModelError: A part that cannot be read or that is not on this machine; a flag
            for what the folder says itself.
    """
    kind = kind_of(path)
    if kind is None or kind == "file":
        read_foreign(path)  # says what is wrong
    facts = read_facts(path)
    if "template" in facts:
        for name, value in (("template", template), ("view", view)):
            if value:
                raise DataError(f"{name}: {path} says how it was trained; leave --{name} out")
        own = _read_export(path, facts)
        tokenizer = _tokenizer(path, own.get("tokenizer"))  # of before, it does not say
        return Published(
            model=read_foreign(path),
            tokenizer=tokenizer,
            template=own["template"],
            spec=own["view"],
            is_own=True,
            trained=own.get("trained", {}),
        )
    folders = _folders(path)
    tokenizer = _tokenizer(_first_with_tokenizer(folders))
    chosen = get_template(template) if template else _derived_template(folders, tokenizer)
    read_view(view)  # before weights are read
    model = read_foreign(path)
    return Published(
        model=model,
        tokenizer=tokenizer,
        template=chosen,
        spec=_view(folders, model, view),
        is_own=False,
    )


class _Export(TypedDict):
    """What `pipelines.export` keeps beside the files of others."""

    template: Template
    view: ImageSpec
    tokenizer: NotRequired[TokenizerFields]
    trained: NotRequired[dict[str, Any]]


def _read_export(path: Path, facts: Mapping[str, Any]) -> _Export:
    known = {name: facts[name] for name in _Export.__annotations__ if name in facts}
    try:
        return as_type(known, _Export)
    except JsonError as error:
        raise TrainError(f"{path / FACTS}: damaged ({error}); export the run again") from None


def published_data(found: Published) -> TrainingData:
    """The properties of the training data that a folder records; the others are empty."""
    tokenizer = tokenizer_facts(found.tokenizer)
    data = TrainingData(
        tokenizer=tokenizer.fingerprint, special_ids=[tokenizer.bos_id, tokenizer.eos_id]
    )
    if found.is_own and found.template is not None and found.spec is not None:
        data = replace(
            data,
            template=template_fingerprint(found.template),
            template_name=found.template.name,
            view=json.loads(json.dumps(found.spec.facts())),
        )
    return replace(data, **found.trained)


def _tokenizer(folder: Path, expected: Mapping[str, Any] | None = None) -> Any:
    """A folder's tokenizer, compared with the facts of the one it should be, where there are any.

    Without LLaVA's `config.json` beside it, of which transformers warns that it is unknown.
    """
    if not is_llava_config(read_config(folder)) or not has_vocabulary(folder):
        tokenizer: Any = load_tokenizer(folder)
    else:
        with tempfile.TemporaryDirectory(prefix="lapilli-") as made:
            for path in kept_files(folder):
                if path.name != CONFIG:
                    (Path(made) / path.name).symlink_to(path.resolve())
            tokenizer = load_tokenizer(Path(made))
        tokenizer.name_or_path = str(folder)
    if expected is not None:
        check_copy(folder, tokenizer, expected, "export the run again")
    return tokenizer


def _folders(path: Path) -> list[Path]:
    """The folder, and the one of the base model of an adapter."""
    if not (path / SETTINGS).is_file():
        return [path]
    name = str(read_settings(path).get("base_model_name_or_path") or "")
    return [path, base_folder(path, name)]


def _first_with_tokenizer(folders: list[Path]) -> Path:
    return next((folder for folder in folders if has_vocabulary(folder)), folders[-1])


def _derived_template(folders: list[Path], tokenizer: Any) -> Template | None:
    """The template whose ids a folder's own chat template writes, if it is one of ours."""
    source = _chat_template(folders, tokenizer)
    if not source:
        return None
    image_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    trials = [turns for turns in TRIALS if turns[0].role == "user"]  # it may refuse a system turn
    try:
        compiled = BoundedTemplate(source)
        written = [_chat_ids(tokenizer, compiled, turns) for turns in trials]
    except Exception:  # a template is a program of others: it may raise anything
        return None
    expected = [[-200 if i == image_id else i for i in ids] for ids in written]
    for name, template in TEMPLATES.items():
        if name == TOKENIZERS_OWN or template.drops_user_text:
            continue
        template = _with_bos(template, tokenizer, source)
        try:
            if [prompt_ids(turns, tokenizer, template) for turns in trials] == expected:
                return template
        except (DataError, ValueError, TypeError):
            continue
    return None


def _with_bos(template: Template, tokenizer: Any, source: str) -> Template:
    """The template writing a bos where the chat template does and the tokenizer adds none."""
    if "bos_token" not in source and str(tokenizer.bos_token) not in source:
        return template
    frames = {
        item.name: value.replace("{bos}", "{bos!}")
        for item in fields(template)
        if isinstance(value := getattr(template, item.name), str)
    }
    return replace(template, **frames)


def _chat_ids(tokenizer: Any, source: BoundedTemplate, turns: Sequence[Turn]) -> list[int]:
    """The ids of a prompt as transformers' processor writes them by a chat template."""
    text = source.render(
        messages_of(turns), tokenizer.special_tokens_map, add_generation_prompt=True
    )
    plain = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    return tokenizer(text, add_special_tokens=not plain)["input_ids"]


def _chat_template(folders: list[Path], tokenizer: Any) -> str:
    """The processor's chat template, or else the tokenizer's."""
    for folder in folders:
        for name in ("chat_template.jinja", "chat_template.json", "processor_config.json"):
            path = folder / name
            if not path.is_file():
                continue
            if path.suffix == ".jinja":
                require_plain(path, MOST_JSON)
                return path.read_text(encoding="utf-8")
            try:
                given = from_json(read_whole(path), dict[str, Any]).get("chat_template")
            except JsonError as error:
                raise TrainError(f"{path}: damaged ({error}); copy the file again") from None
            if isinstance(given, str):
                return given
    own = getattr(tokenizer, "chat_template", None)
    return own if isinstance(own, str) else ""


def read_view(view: str) -> dict[str, Any]:
    """The fields of an `ImageSpec` that a user gives; `pad`, `crop` or `stretch` is the aspect.

    Raises:
        DataError: Neither one of those words nor a mapping of fields.
    """
    if not view:
        return {}
    if view in ASPECTS:
        return {"aspect": view}
    try:
        found: object = load_yaml(view)
    except UnusableYaml:
        found = None
    if not isinstance(found, dict):
        raise DataError(
            f"view: {view!r}; expected {', '.join(ASPECTS)}, or fields such as "
            "'{aspect: pad, fill: [122, 116, 104]}'"
        )
    return cast("dict[str, Any]", found)


def _view(folders: list[Path], model: VisionLanguageModel, view: str) -> ImageSpec | None:
    given = read_view(view)
    mean = model.config.vision.mean
    found: dict[str, Any] = {"size": model.vision.image_size}
    if mean is not None:  # what LLaVA and transformers pad with
        found["fill"] = tuple(int(255 * value) for value in mean)
    aspect = _aspect(folders, model)
    if aspect:
        found["aspect"] = aspect
    if given.get("fill") == "mean":
        if mean is None:
            raise DataError(
                f"view: fill mean; the model's tower {model.config.vision.tower} has none"
            )
        given = {name: value for name, value in given.items() if name != "fill"}
    found |= given
    if found["size"] != model.vision.image_size:
        raise DataError(
            f"view: size {found['size']}; the model takes images of {model.vision.image_size} px"
        )
    if "aspect" not in found or "fill" not in found:
        return None
    return ImageSpec.of(found)


def _aspect(folders: list[Path], model: VisionLanguageModel) -> str:
    """How the folder's own programs make an image square; empty where it does not say."""
    for folder in folders:
        config = read_config(folder)
        if is_llava_config(config):
            if config.get("image_aspect_ratio") == "pad":
                return "pad"
            return _processors_aspect(Path(model.config.vision.pretrained))
        if found := _processors_aspect(folder):
            return found
    return ""


def _processors_aspect(folder: Path) -> str:
    """What an image processor's settings say."""
    from transformers.image_processing_base import ImageProcessingMixin

    if not folder.is_dir():
        return ""
    try:
        given: dict[str, Any] = ImageProcessingMixin.get_image_processor_dict(folder)[0]
    except (OSError, ValueError):
        return ""
    if given.get("do_pad"):
        return "pad"
    if given.get("do_center_crop"):
        return "crop"
    size = given.get("size")
    return "stretch" if isinstance(size, Mapping) and {*size} >= {"height", "width"} else ""
