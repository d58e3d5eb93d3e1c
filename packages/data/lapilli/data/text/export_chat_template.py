"""Convert a template to a Jinja chat template for other tools.

It writes messages as `render` writes records: content is a string, or a list of
`{"type": "text", "text": ...}` and `{"type": "image"}`. All that a model reads is in its text, the
beginning of a text included, so that a reader's tokenizer adds nothing.
"""

from __future__ import annotations

import json
from typing import Any

from lapilli.data.text.rendering import frame_pieces
from lapilli.data.text.templates import Template
from lapilli.data.text.tokenizer import Backend, backend_for

__all__ = ["IMAGE", "chat_template"]

IMAGE = "<image>"
_ANSWER = "\ue0b2"  # marks the answer to come; no template strips, cuts or compares it


def chat_template(template: Template, tokenizer: Any) -> str:
    """The Jinja source that equals the template.

    Args:
        template: The template, bound to the tokenizer (`tokenize.bind_template`).
        tokenizer: The tokenizer that the records were made with. It determines what is written for
            `{bos}`, here as in `tokenize.encode`.
    """
    backend = backend_for(tokenizer)
    body = _own(template.chat) if template.chat else _frames(template, backend)
    if backend.first is backend.later:
        return body
    return _spaced(body, _specials(template, backend), opening="" if template.chat else "bos")


def _own(source: str) -> str:
    """A text model's own chat template, for content in parts.

    It is given texts with `<image>` in them, as training gives it texts with a stand-in. The prompt
    is the text before an answer, for what a template writes by `add_generation_prompt` may
    differ from it (Qwen3 puts empty thoughts before an answer).
    """
    # `trim_blocks` takes the line end behind `set`; `+` keeps white space in front of `endset`, and
    # Jinja drops one line end at the end of a source.
    return (
        f"{_JOINED}{{%- set text %}}\n{source.removesuffix(chr(10))}{{%+ endset %}}"
        f"{{{{ text.split({json.dumps(_ANSWER)})[0] }}}}"
    )


_JOINED = (
    "{%- set joined = namespace(messages=[]) %}"
    "{%- for message in messages %}"
    "{%- set said = namespace(text='') %}"
    "{%- if message['content'] is string or message['content'] is not iterable %}"
    "{%- set said.text = message['content'] %}"
    "{%- else %}{%- for part in message['content'] %}"
    f"{{%- set said.text = said.text + ('{IMAGE}' if part['type'] == 'image' else part['text']) %}}"
    "{%- endfor %}{%- endif %}"
    "{%- set joined.messages = joined.messages + [dict(message, content=said.text)] %}"
    "{%- endfor %}"
    "{%- set messages = joined.messages %}"
    "{%- if messages and messages[0]['role'] == 'assistant' %}"
    "{%- set messages = messages[1:] %}"
    "{%- endif %}"
    "{%- if add_generation_prompt %}"
    f"{{%- set answer = dict(role='assistant', content={json.dumps(_ANSWER)}) %}}"
    "{%- set messages = messages + [answer] %}"
    "{%- set add_generation_prompt = false %}"
    "{%- endif %}"
)


def _frames(template: Template, backend: Backend) -> str:
    """The Jinja source of a template made of frames."""

    def frame(text: str) -> str:
        return _literal("".join(_written(text, backend)))

    system = (
        f"{{%- if system %}}{frame(template.before_system)}{{{{ system }}}}"
        f"{frame(template.after_system)}{{%- endif %}}"
    )
    image = frame(template.image_start) + _literal(IMAGE) + frame(template.image_end)
    asked = _parts(image, images_first=template.images_first)
    return "".join(
        [
            f"{{%- set system = {json.dumps(template.system, ensure_ascii=False)} %}}",
            _SPLIT,
            frame(template.opening),
            "" if template.system_in_user else system,
            "{%- for message in messages %}",
            "{%- if message['role'] == 'user' %}",
            frame(template.before_user),
            f"{{%- if loop.first %}}{system}{{%- endif %}}" if template.system_in_user else "",
            _images_alone(image) if template.drops_user_text else asked,
            frame(template.after_user),
            "{%- elif message['role'] == 'assistant' %}",
            frame(template.before_answer) + frame(template.answer_start),
            _parts(image, images_first=False),
            frame(template.answer_end) + frame(template.after_answer),
            "{%- else %}",
            "{{ raise_exception('a system message may only stand first') }}",
            "{%- endif %}",
            "{%- endfor %}",
            "{%- if add_generation_prompt %}",
            frame(template.before_answer),
            "{%- endif %}",
        ]
    )


def _written(frame: str, backend: Backend) -> list[str]:
    """The pieces of a frame; special tokens as their content."""
    pieces: list[str] = []
    for is_special, word in frame_pieces(frame):
        if is_special and word in ("bos", "bos!", "eos"):
            ids = backend.special_ids(word)
            pieces += [backend.first.id_to_token(number) or "" for number in ids]
        else:
            pieces.append(word)
    return pieces


_SPLIT = (
    "{%- if messages and messages[0]['role'] == 'system' %}"
    "{%- set said = messages[0]['content'] %}"
    "{%- set system = said if said is string else said | map(attribute='text') | join %}"
    "{%- set messages = messages[1:] %}"
    "{%- endif %}"
    "{%- if messages and messages[0]['role'] == 'assistant' %}"
    "{%- set messages = messages[1:] %}"
    "{%- endif %}"
)


def _parts(image: str, *, images_first: bool) -> str:
    """Jinja that writes what one message says."""
    in_order = (
        "{%- for part in message['content'] %}"
        f"{{%- if part['type'] == 'image' %}}{image}{{%- else %}}{{{{ part['text'] }}}}"
        "{%- endif %}{%- endfor %}"
    )
    if images_first:
        in_order = (
            "{%- set pictures = message['content'] | selectattr('type', 'equalto', 'image') "
            "| list %}"
            "{%- set words = message['content'] | selectattr('type', 'equalto', 'text') "
            "| map(attribute='text') | join %}"
            "{%- if pictures %}{%- set words = words.strip() %}{%- endif %}"
            "{%- for picture in pictures %}"
            f'{image}{{%- if words or not loop.last %}}{{{{ "\\n" }}}}{{%- endif %}}'
            "{%- endfor %}{{ words }}"
        )
    return (
        "{%- if message['content'] is string %}{{ message['content'] }}"
        f"{{%- else %}}{in_order}{{%- endif %}}"
    )


def _images_alone(image: str) -> str:
    """Jinja that writes the images of a message and none of its words."""
    return (
        "{%- if message['content'] is not string %}{%- for part in message['content'] %}"
        f"{{%- if part['type'] == 'image' %}}{image}{{%- endif %}}{{%- endfor %}}{{%- endif %}}"
    )


def _specials(template: Template, backend: Backend) -> list[str]:
    """The special tokens that a template writes."""
    frames = (
        template.opening, template.before_system, template.after_system, template.before_user,
        template.after_user, template.before_answer, template.answer_start, template.answer_end,
        template.after_answer, template.image_start, template.image_end,
    )  # fmt: skip
    text = template.chat + "".join(word for one in frames for word in _written(one, backend))
    roles = {backend.first.id_to_token(ids[0]) or "" for ids in backend.roles.values() if ids}
    return sorted({name for name in backend.specials if name in text} | roles)


def _spaced(body: str, specials: list[str], *, opening: str) -> str:
    """A template for a tokenizer that puts a space before the first text of several alone.

    Training puts it before a text behind an image too, and before the first text behind a bos. A
    space written there is the same, unless a special token follows at once.
    """
    lines = [f"{{%- set text %}}{body}{{%- endset %}}", f"{{%- set image = '{IMAGE}' %}}"]
    names = json.dumps([IMAGE, *specials], ensure_ascii=False)
    lines += [
        "{%- set spaced = namespace(text=text.replace(image, image + ' ')) %}",
        f"{{%- for name in {names} %}}",
        "{%- set spaced.text = spaced.text.replace(image + ' ' + name, image + name) %}",
        "{%- endfor %}",
        "{%- if spaced.text.endswith(image + ' ') %}{%- set spaced.text = spaced.text[:-1] %}",
        "{%- endif %}",
    ]
    if opening:
        lines += [
            "{%- set rest = spaced.text[bos_token | length:] %}",
            "{%- set follows = namespace(special=not rest) %}",
            f"{{%- for name in {names} %}}{{%- if rest.startswith(name) %}}",
            "{%- set follows.special = true %}{%- endif %}{%- endfor %}",
            "{%- if spaced.text.startswith(bos_token) and not follows.special %}",
            "{%- set spaced.text = bos_token + ' ' + rest %}",
            "{%- endif %}",
        ]
    return "".join([*lines, "{{ spaced.text }}"])


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
