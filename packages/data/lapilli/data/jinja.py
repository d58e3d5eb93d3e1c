"""A template as the Jinja chat template that other tools read.

It writes messages as `render` writes records: content is a string, or a list of
`{"type": "text", "text": ...}` and `{"type": "image"}`.
"""

from __future__ import annotations

import json
from typing import Any

from lapilli.data.errors import DataError
from lapilli.data.render import frame_pieces
from lapilli.data.templates import Template

__all__ = ["chat_template"]

IMAGE = "<image>"


def chat_template(template: Template, tokenizer: Any) -> str:
    """The Jinja source that equals the template.

    Args:
        template: The template, bound to the tokenizer (`tokenize.bind_template`).
        tokenizer: A transformers tokenizer, for its beginning and end.

    Raises:
        DataError: The template drops what a user says, so it writes no chat.
    """
    if template.chat:
        return template.chat
    if template.drops_user_text:
        raise DataError(
            f"template {template.name}: drops what a user says and so is no chat template; export "
            "a run whose dataset was built with a template that keeps it"
        )

    def frame(text: str) -> str:
        tokens = {"bos": tokenizer.bos_token or "", "eos": tokenizer.eos_token or ""}
        pieces = [
            tokens.get(word, word) if special else word for special, word in frame_pieces(text)
        ]
        return _literal("".join(pieces))

    system = (
        f"{{%- if system %}}{frame(template.before_system)}{{{{ system }}}}"
        f"{frame(template.after_system)}{{%- endif %}}"
    )
    image = frame(template.image_start) + _literal(IMAGE) + frame(template.image_end)
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
            _parts(image, images_first=template.images_first),
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


def _literal(text: str) -> str:
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""
