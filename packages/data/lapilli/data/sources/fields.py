"""Classify every field of a record: used, known to be harmless, unsupported, or unknown.

A field that changes what a record means and that nothing here can express (a video, a tool, a
rejected answer) is the record's verdict. Null and empty values change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from lapilli.data.mounts.keys import is_base64
from lapilli.data.record import Reason, Role, Verdict, excerpt

__all__ = [
    "HARMLESS",
    "IMAGE_FIELDS",
    "NOTHING",
    "TURN_EXTRAS",
    "Inspection",
    "Layout",
    "inspect_fields",
    "inspect_turns",
    "is_empty",
    "role_error",
    "turn_extras",
    "words",
]


def words(text: str) -> frozenset[str]:
    """The words of a text, for a long list of names."""
    return frozenset(text.split())


IMAGE_FIELDS = ("image", "images", "image_path", "image_paths")

# What published sets carry beside a conversation: where a record is from and how it was made.
HARMLESS = words(
    """
    id ids idx index key uid uuid guid sample_id record_id item_id question_id questionId qid
    conversation_id conv_id data_id original_id origin_id dataset_id source_id example_id
    row_id source sources data_source source_dataset data_sources dataset dataset_name
    data_name data_set origin original_source subset subset_name split config category
    categories sub_category subcategory categroy model model_name model_id generator annotator
    type task task_type tasks task_name data_type domain subject topic topics field tag tags
    keyword keywords label_type question_type answer_type qa_type image_type difficulty level
    grade license licence copyright author url urls link page_url language lang languages
    locale country created created_at updated_at date time timestamp version revision hash md5
    sha256 checksum phash meta metadata meta_data info extra extra_info misc stats note notes
    comment comments width height widths heights width_list height_list image_width
    image_height image_size image_sizes image_resolution original_width original_height
    resolution aspect_ratio size num_images n_images image_count images_count num_turns
    n_turns num_tokens token_count text_tokens image_tokens length lengths channel quality
    score scores rating ratings quality_score similarity clip_score aesthetic aesthetic_score
    relevance_ratings relevance_min visual_dependency_ratings visual_dependency_min
    image_correspondence_ratings image_correspondence_min formatting_ratings formatting_min
    status error_message exif punsafe pwatermark nsfw watermark tool_choice
    parallel_tool_calls temperature top_p seed stop max_tokens
    """
)
# An image's name if it looks like one and the record has no image otherwise; harmless if not.
_NAMES_OF_FILES = words(
    """
    image_id image_ids img_id image_name img_name file_name filename file files file_path
    filepath path paths image_source image_url img_url
    """
)
_TURN_HARMLESS = words(
    """
    id idx index turn turn_id turn_index msg_id message_id uuid parent parent_id children name
    user model source type category lang language timestamp time created create_time
    created_at date status rank emoji markdown tokens num_tokens token_count length
    annotations end_turn recipient channel metadata meta score quality
    """
)
_PART_HARMLESS = frozenset({"detail", "id", "format", "cache_control", "annotations", "mime_type"})

# What no record here can express.
_TOOLS = """
    tools functions function tool_calls tool_call function_call function_calls tool_call_id
    tool_responses tool_response available_tools observation observations
"""
_MEDIA = """
    video videos video_path video_paths video_url audio audios audio_path audio_paths audio_url
    speech sound sounds voice wav clip clips frames frame_paths point_cloud point_clouds pointcloud
"""
_PREFERENCES = """
    rejected chosen rejected_response chosen_response rejected_messages chosen_messages
    rejected_images rejected_conversations rejected_answer chosen_answer preferred_output
    non_preferred_output positive_messages negative_messages completions
"""
_OTHERS = """
    reasoning thinking thought thoughts thinking_content reasoning_details history refusal
"""
_PLACES = words(
    """
    objects bbox bboxes box boxes bounding_box bounding_boxes region regions mask masks
    segmentation segmentations polygon polygons point points keypoints
    """
)
_LOSS = words(
    """
    loss_mask loss_masks loss_scale loss_weight loss_weights trainable training train_detail
    masked is_masked mask_loss assistant_masks completion_mask sample_weight
    """
)
_MEANING = words(f"{_TOOLS} {_MEDIA} {_PREFERENCES} {_OTHERS}")

TURN_EXTRAS = ("weight", "loss", "train", "reasoning_content")
_TRAINED = ("weight", "loss", "train")
_TOOL_ROLES = words(
    """
    tool tools tool_call tool_calls tool_response tool_result tool_output function
    function_call function_response function_result observation ipython environment
    """
)
_USERS = frozenset({"user", "human"})
_MEDIA_TAG = re.compile(r"<(?:img|video|audio)>|<\|(?:image|video|audio|vision)")
# What the templates of other models write for a medium.
_PLACEHOLDER = re.compile(
    r"<\|(?:image|video|audio|image_pad|video_pad|audio_pad|vision_start|audio_bos)\|>"
)
_FILE_IN_TAGS = re.compile(r"<(img|video|audio)>[^<>]*</\1>")
_MEDIA_NAME = re.compile(
    r"\.(jpe?g|jpe|jfif|png|gif|bmp|webp|tiff?|avif|heic|jp2|jxl|svg|mp4|mov|avi|mkv|webm|m4v|wav|"
    r"mp3|flac|ogg|m4a|pdf|npy)$",
    re.IGNORECASE,
)
_DEEPEST = 4  # levels of a field's value that are looked at
_EMPTY_TEXTS = frozenset({"", "[]", "{}", "null", "None"})


@dataclass(frozen=True, slots=True)
class Inspection:
    """What the fields of one element amount to.

    Attributes:
        unsupported: What changes its meaning and cannot be expressed, for a verdict; "" if nothing.
        unread: Names of the fields that nothing reads, `conversations.name` for those of a turn.
    """

    unsupported: str = ""
    unread: tuple[str, ...] = ()

    def __or__(self, other: Inspection) -> Inspection:
        """Both, the first verdict first."""
        if other is NOTHING:
            return self
        return Inspection(self.unsupported or other.unsupported, (*self.unread, *other.unread))


NOTHING = Inspection()


@dataclass(frozen=True, slots=True)
class Layout:
    """The names that a format reads in a turn, and where it keeps speaker and text.

    Without a `role` each of its turns has a question under `content`.
    """

    role: str
    content: str
    understood: frozenset[str]
    parts: frozenset[str] = frozenset()


def is_empty(value: Any, depth: int = 0) -> bool:
    """Whether a value says nothing: null, false, or a text, list or object without content."""
    if value is None or value is False:
        return True
    if isinstance(value, str):
        return value.strip() in _EMPTY_TEXTS
    return (
        depth < _DEEPEST and _is_nested(value) and all(is_empty(v, depth + 1) for v in _in(value))
    )


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, dict))


def _in(value: Any) -> Iterable[Any]:
    """The values in a list or an object."""
    nested = cast("dict[str, Any] | list[Any]", value)
    return nested.values() if isinstance(nested, dict) else nested


def inspect_fields(
    fields: Mapping[str, Any],
    understood: frozenset[str],
    has_others: Callable[[], bool] = lambda: False,
) -> Inspection:
    """The fields of an element, its turns aside.

    Args:
        fields: The element.
        understood: The names that its format reads.
        has_others: Asks whether it has images beside those under `IMAGE_FIELDS`.
    """
    if fields.keys() <= understood or all(n in understood or n in HARMLESS for n in fields):
        return NOTHING
    found = NOTHING
    has_images = any(not is_empty(fields.get(name)) for name in IMAGE_FIELDS) or has_others()
    for name, value in fields.items():
        if name not in understood and name not in HARMLESS:
            found |= _inspect(name, value, has_images)
    return found


def _inspect(name: str, value: Any, has_images: bool) -> Inspection:
    """One field of an element that its format does not read."""
    if value is None:
        return NOTHING
    if _changes_meaning(name, value):
        return _unsupported(name)
    if name in ("label", "kto_tag") and value in (0, 1):  # equal to false and true
        return _unsupported(name, "says whether the answer is wanted")
    if not has_images and _holds_media(value):
        return _unsupported(name, "names an image or another medium, and the record has none")
    return NOTHING if name in _NAMES_OF_FILES else _unread(excerpt(name), value)


def _changes_meaning(name: str, value: Any) -> bool:
    """Whether a field that is not read says something that must not be left out."""
    name = name.lower()
    if name in _TRAINED:
        return value is not None and value != 1
    if name in _LOSS:
        return value is not None
    if name in _PLACES:
        is_written = isinstance(value, str) and value.strip()[:1] in ("[", "{", "<")
        return (is_written or _is_nested(value)) and not is_empty(value)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return name in _MEANING and not is_number and not is_empty(value)


def _unread(name: str, value: Any) -> Inspection:
    """A field that is counted; one that says nothing and would change the meaning is not."""
    known = name.rpartition(".")[2]
    silent = known in _MEANING or known in _PLACES or known in _TRAINED or known in IMAGE_FIELDS
    return NOTHING if silent and is_empty(value) else Inspection(unread=(name,))


def _unsupported(name: str, what: str = "changes what the record means") -> Inspection:
    return Inspection(f"`{excerpt(name)}` {what}")


def _holds_media(value: Any, depth: int = 0) -> bool:
    """Whether a value names a file of pixels or sound, or holds one."""
    if isinstance(value, str):
        is_inside = value.startswith("data:") or is_base64(value)
        return is_inside or _MEDIA_NAME.search(value.rstrip()) is not None
    if isinstance(value, dict) and not is_empty(cast("dict[str, Any]", value).get("bytes")):
        return True
    if depth < _DEEPEST and _is_nested(value):
        return any(_holds_media(inner, depth + 1) for inner in _in(value))
    return isinstance(value, bytes) and value != b""


def inspect_turns(where: str, turns: Any, layout: Layout) -> Inspection:
    """The fields of a list of turns, and the media that a question names in its text.

    Args:
        where: Name of the list.
        turns: The list; anything else is left to the format.
        layout: The names that the format reads in a turn.
    """
    if not isinstance(turns, list) or _are_plain(cast("list[Any]", turns), layout):
        return NOTHING
    found = NOTHING
    for place, turn in enumerate(cast("list[Any]", turns)):
        if not isinstance(turn, dict):
            continue
        fields = cast("dict[str, Any]", turn)
        if len(fields) > 2 and not fields.keys() <= layout.understood:
            found |= _inspect_turn(where, place, fields, layout)
        content = fields.get(layout.content)
        if isinstance(content, str):
            asks = not layout.role or fields.get(layout.role) in _USERS
            if asks and not found.unsupported:
                found |= _inspect_text(place, content)
        elif isinstance(content, list):
            found |= _inspect_parts(where, place, cast("list[Any]", content), layout)
    return found


def _are_plain(turns: list[Any], layout: Layout) -> bool:
    """Whether all turns have two fields and a text without tags of media: nearly all records."""
    name = layout.content
    try:  # 5 million turns in 665K records
        texts: list[Any] = [turn[name] for turn in turns if len(turn) == 2]
        tagged: list[str] = [text for text in texts if "<" in text]
        "".join(texts)  # of texts alone, and a tenth of the time of asking each
    except (TypeError, LookupError):
        return False
    return len(texts) == len(turns) and not any(_MEDIA_TAG.search(text) for text in tagged)


def _inspect_turn(where: str, place: int, fields: dict[str, Any], layout: Layout) -> Inspection:
    found = NOTHING
    for name, value in fields.items():
        if name in layout.understood or name in _TURN_HARMLESS or value is None:
            continue
        if _changes_meaning(name, value) or _holds_media(value):
            found |= _unsupported(name, f"of turn {place} changes what the record means")
        else:
            found |= _unread(f"{where}.{excerpt(name)}", value)
    return found


def _inspect_text(place: int, text: str) -> Inspection:
    """A placeholder, or a file between two tags; HTML has another element between them."""
    tags = (f"<{name}>" for name in ("video", "audio") if f"</{name}>" not in text)
    shown = next((tag for tag in tags if tag in text), "")
    if not shown and (between := _FILE_IN_TAGS.search(text) or _PLACEHOLDER.search(text)):
        shown = excerpt(between[0], 60)
    detail = f"'{shown}' in turn {place} stands for a medium that is not read from a text"
    return Inspection(detail) if shown else NOTHING


def _inspect_parts(where: str, place: int, parts: list[Any], layout: Layout) -> Inspection:
    found = NOTHING
    for part in parts:
        for name, value in cast("dict[str, Any]", part).items() if isinstance(part, dict) else ():
            if name in layout.parts or name in _PART_HARMLESS or value is None:
                continue
            if _changes_meaning(name, value) or _holds_media(value):
                what = f"in a part of turn {place} changes what the record means"
                found |= _unsupported(name, what)
            else:
                found |= _unread(f"{where}.{layout.content}.{excerpt(name)}", value)
    return found


def turn_extras(fields: Mapping[str, Any], role: Role) -> tuple[bool, str] | Verdict:
    """Whether a turn is to be trained, and the thinking text before it.

    `weight`, `loss` and `train` are 0 or false for a turn that is not trained, 1 or true for one
    that is; a question is never trained, so it may only say that it is not.
    """
    wishes: dict[str, bool] = {}
    for name in _TRAINED:
        value = fields.get(name)
        if value is None:
            continue
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            detail = f"`{name}` is {excerpt(repr(value), 40)}; expected 0 or 1, false or true"
            return Verdict(Reason.UNSUPPORTED_FIELD, detail)
        if value and role != "assistant":
            detail = f"`{name}` asks to train what {role} says; only answers are trained"
            return Verdict(Reason.UNSUPPORTED_FIELD, detail)
        wishes[name] = bool(value)
    if len(set(wishes.values())) > 1:
        detail = f"{' and '.join(f'`{name}`' for name in wishes)} contradict each other"
        return Verdict(Reason.UNSUPPORTED_FIELD, detail)
    reasoning = fields.get("reasoning_content")
    if is_empty(reasoning):
        reasoning = ""
    if not isinstance(reasoning, str) or (reasoning and role != "assistant"):
        detail = "`reasoning_content`: expected a text, before an answer"
        return Verdict(Reason.UNSUPPORTED_FIELD, detail)
    return next(iter(wishes.values()), True), reasoning


def role_error(speaker: str, known: Iterable[str]) -> Verdict:
    """The verdict on a turn whose speaker has no part in a conversation here."""
    name = excerpt(speaker)
    if speaker in _TOOL_ROLES:
        detail = f"a turn of '{name}' is a tool's, which no template here writes"
        return Verdict(Reason.UNSUPPORTED_FIELD, detail)
    remedy = f"say who it is in the source's `roles`, e.g. {{{name}: user}}"
    return Verdict(Reason.UNKNOWN_ROLE, f"'{name}'; known: {', '.join(known)}; {remedy}")
