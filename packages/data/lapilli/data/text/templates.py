"""Conversation templates as data: frames, special tokens, trained parts.

The strings that frame a turn (`opening`, `before_user`, `answer_end`, ...) may name special tokens
in braces: `{bos}` and `{eos}` are the tokenizer's own, any other name is a token's literal content,
as in `{<|im_start|>}`. Braces mean something in those strings only, never in the text of a record
or of a system prompt. `render` writes a record down by a template.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, cast

from lapilli.data.errors import DataError
from lapilli.data.io.whole_file import read_whole
from lapilli.data.io.yaml_text import UnusableYaml, load_yaml
from lapilli.data.record import excerpt

__all__ = ["TEMPLATES", "TOKENIZERS_OWN", "Template", "get_template", "template_facts"]

TOKENIZERS_OWN = "tokenizer"
"""The template's name, and its `chat`, that stand for the chat template a tokenizer brings."""

CHAT_WAY = 2  # 1 wrote every text into the frames of its order of roles, whatever the text was


@dataclass(frozen=True, slots=True)
class Template:
    """How a conversation is rendered.

    A record becomes `opening`, then `before_system` + system text + `after_system` where there is
    a system text, then each turn in its frame. Frames may name special tokens in braces; a token
    that the tokenizer lacks is written as text, with a warning.

    Attributes:
        name: What the manifest calls it.
        opening: Frame at the very start. A `{bos}` is left out for a tokenizer that adds none by
            itself; `{bos!}` is written for any that has one.
        system: System text of a record that has no system turn of its own. Plain text.
        before_system: Frame before the system text.
        after_system: Frame after the system text.
        before_user: Frame before a user's turn.
        after_user: Frame after a user's turn.
        before_answer: Frame before an answer: the end of what a prompt gives the model.
        answer_start: Trained frame between `before_answer` and the answer, such as the space that
            many tokenizers join with the answer's first word.
        answer_end: Trained frame after the answer: what tells the model to stop.
        after_answer: Untrained frame after `answer_end`.
        trains: "answers": each answer with `answer_start` and `answer_end`; "all": all but images.
        drops_user_text: Keep only the images of a user's turn, and no word of it.
        images_first: Move a turn's images to its front, each followed by a newline, and strip
            white space around the turn. A turn without images stays as it is.
        system_in_user: The system text and its frames stand inside the first user's turn.
        image_start: Frame before each image, such as `{<im_start>}`.
        image_end: Frame after each image, such as `{<im_end>}`.
        image_marker: Text that marks an image's place too, beside the source's `<image>`.
        chat: Jinja source of a chat template, which then takes the place of all frames;
            "tokenizer": the one that the tokenizer brings.
    """

    name: str
    opening: str = "{bos}"
    system: str = ""
    before_system: str = ""
    after_system: str = ""
    before_user: str = ""
    after_user: str = ""
    before_answer: str = ""
    answer_start: str = ""
    answer_end: str = "{eos}"
    after_answer: str = ""
    trains: Literal["answers", "all"] = "answers"
    drops_user_text: bool = False
    images_first: bool = False
    system_in_user: bool = False
    image_start: str = ""
    image_end: str = ""
    image_marker: str = ""
    chat: str = ""


# The wordings that models were trained with; another wording would be another template.
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_CURIOUS_HUMAN = _CURIOUS_USER.replace("user", "human")

_PLAIN = Template(name="plain", answer_end="\n", drops_user_text=True, images_first=True)

_V1 = Template(
    name="v1",
    system=_CURIOUS_USER,
    after_system=" ",
    before_user="USER: ",
    after_user=" ",
    before_answer="ASSISTANT:",
    answer_start=" ",
    images_first=True,
)
_LLAVA_V1 = replace(_V1, name="llava_v1", system=_CURIOUS_HUMAN)

# "###" ends an answer and begins the next turn at once, so the frames share it between them.
_V0 = Template(
    name="v0",
    system=_CURIOUS_HUMAN,
    after_system="\n\n### ",
    before_user="Human: ",
    after_user="\n### ",
    before_answer="Assistant:",
    answer_start=" ",
    answer_end="\n###",
    after_answer=" ",
    images_first=True,
)

_LLAVA_LLAMA_2 = Template(
    name="llava_llama_2",
    opening="",
    system=(
        "You are a helpful language and vision assistant. "
        "You are able to understand the visual content that the user provides, "
        "and assist the user with a variety of tasks using natural language."
    ),
    before_system="<<SYS>>\n",
    after_system="\n<</SYS>>\n\n",
    before_user="{bos}[INST] ",
    after_user=" [/INST]",
    answer_start=" ",
    answer_end=" {eos}",
    images_first=True,
    system_in_user=True,
)

_MPT = Template(
    name="mpt",
    system=(
        "A conversation between a user and an LLM-based AI assistant. "
        "The assistant gives helpful and honest answers."
    ),
    before_system="{<|im_start|>}system\n",
    after_system="{<|im_end|>}",
    before_user="{<|im_start|>}user\n",
    after_user="{<|im_end|>}",
    before_answer="{<|im_start|>}assistant\n",
    answer_end="{<|im_end|>}",
    images_first=True,
)
_CHATML = replace(
    _MPT,
    name="chatml",
    system="You are a helpful assistant.",
    after_system="{<|im_end|>}\n",
    after_user="{<|im_end|>}\n",
    after_answer="\n",
)
# Basic-Vision-Language-Model: Qwen's ChatML, but the answer ends with the tokenizer's end of text.
_QWEN_VL = replace(
    _MPT,
    name="qwen_vl",
    system="你是一位图像理解助手。",
    before_user="\n{<|im_start|>}user\n",
    before_answer="\n{<|im_start|>}assistant\n",
    answer_end="{<|endoftext|>}",
    images_first=False,
    image_marker="<|extra_0|>",
)

_LLAMA_3 = Template(
    name="llama_3",
    opening="{<|begin_of_text|>}",
    system=_CURIOUS_USER,
    before_system="{<|start_header_id|>}system{<|end_header_id|>}\n\n",
    after_system="{<|eot_id|>}",
    before_user="{<|start_header_id|>}user{<|end_header_id|>}\n\n",
    after_user="{<|eot_id|>}",
    before_answer="{<|start_header_id|>}assistant{<|end_header_id|>}\n\n",
    answer_end="{<|eot_id|>}",
    images_first=True,
)
_PHI_3 = Template(
    name="phi_3",
    system="You are a helpful AI assistant.",
    before_system="{<|system|>}\n",
    after_system="{<|end|>}",
    before_user="\n{<|user|>}\n",
    after_user="{<|end|>}",
    before_answer="\n{<|assistant|>}\n",
    answer_end="{<|end|>}",
    images_first=True,
)

# vlm_training on phi-1.5: ChatML spelt out as text, with LLaVA's names as roles; all is trained.
_PHI_HF = Template(
    name="phi_hf",
    opening="",
    before_system="<|im_start|>system\n",
    after_system="<|im_end|>\n",
    before_user="<|im_start|>human\n",
    after_user="<|im_end|>\n",
    before_answer="<|im_start|>gpt\n",
    answer_end="<|im_end|>",
    after_answer="\n",
    trains="all",
)
# Its first stage: instruction, "Answer:", caption; nothing ends the caption.
_PHI_HF_PRETRAIN = Template(
    name="phi_hf_pretrain", opening="", before_answer="\n\nAnswer:", answer_end="", trains="all"
)

_MISTRAL_GAUDI = replace(
    _LLAVA_V1, name="mistral_gaudi", before_user="User: ", before_answer="Assistant:"
)

_TEMPLATES = (
    _PLAIN, _V1, _LLAVA_V1, _V0, _LLAVA_LLAMA_2, _MPT, _CHATML, _QWEN_VL, _LLAMA_3, _PHI_3,
    _PHI_HF, replace(_PHI_HF, name="phi_hf_masked", trains="answers"), _PHI_HF_PRETRAIN,
    _MISTRAL_GAUDI, Template(name=TOKENIZERS_OWN, chat=TOKENIZERS_OWN),
)  # fmt: skip
TEMPLATES: dict[str, Template] = {
    **{template.name: template for template in _TEMPLATES},
    "vicuna_v1": _V1,
}
"""The conversation templates by name."""


def template_facts(template: Template) -> dict[str, Any]:
    """What decides how records are written down: the template and, of a chat template, the way."""
    return asdict(template) | ({"chat_way": CHAT_WAY} if template.chat else {})


def get_template(name_or_path: str | Path | Template) -> Template:
    """The template of that name, or from that `.yaml` file; a Template is returned as it is.

    Raises:
        DataError: For an unknown name, a missing file, and a file that is no template.
    """
    if isinstance(name_or_path, Template):
        return name_or_path
    if Path(name_or_path).suffix in {".yaml", ".yml"}:
        return _load_template(Path(name_or_path))
    if str(name_or_path) not in TEMPLATES:
        names = ", ".join(sorted(TEMPLATES))
        raise DataError(
            f"template {_shown(str(name_or_path))} is unknown: take one of {names}, "
            "or give the path of a .yaml file"
        )
    return TEMPLATES[str(name_or_path)]


def _load_template(path: Path) -> Template:
    """Read a template from a YAML mapping whose keys are the fields.

    `name` may be left out; `base` names a template whose fields are taken where the file has none.
    """
    try:
        content: object = load_yaml(read_whole(path).decode())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(f"template file {path}: {reason}; check the path") from error
    except (UnusableYaml, UnicodeDecodeError) as error:
        what = " ".join(str(error).split())
        raise DataError(f"template file {path} is not YAML: {what}") from error
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise DataError(f"template file {path}: expected a mapping of fields, found {kind}")
    settings = cast("dict[str, Any]", content)
    base = settings.pop("base", None)
    for key, value in settings.items():
        _check_setting(path, key, value)
    inherited: dict[str, Any] = {} if base is None else asdict(_base(path, base))
    found: dict[str, Any] = inherited | {"name": path.stem} | settings
    return Template(**found)


def _base(path: Path, name: object) -> Template:
    if not isinstance(name, str) or name not in TEMPLATES:
        names = ", ".join(sorted(TEMPLATES))
        raise DataError(
            f"template file {path}: base {_shown(name)} is unknown: take one of {names}"
        )
    return TEMPLATES[name]


def _check_setting(path: Path, key: str, value: object) -> None:
    """Reject an unknown key, and a value of another type than the field's."""
    known: dict[str, object] = {field.name: field.default for field in fields(Template)}
    if key not in known:
        raise DataError(
            f"template file {path}: unknown key {_shown(key)}; the keys are "
            f"{', '.join(known)}, base"
        )
    if key == "trains" and value not in ("answers", "all"):
        raise DataError(
            f"template file {path}: trains is 'answers' or 'all', found {_shown(value)}"
        )
    default = known[key]
    expected: type[object] = str if default is MISSING else type(default)
    if not isinstance(value, expected):
        raise DataError(
            f"template file {path}: {key} is {expected.__name__}, found {_shown(value)}; "
            "quote a text"
        )


def _shown(value: object) -> str:
    return excerpt(repr(value))
