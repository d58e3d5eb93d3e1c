"""Chat templates in the manner of those that models bring, written for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["MANNERS", "SPECIALS", "Manner"]

SPECIALS = [
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
    "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|end|>", "[INST]", "[/INST]", "<|User|>", "<|Assistant|>",
]  # fmt: skip


def _kept(text: str) -> str:
    return text


def _behind_thinking(text: str) -> str:
    return text.split("</think>")[-1]


@dataclass(frozen=True)
class Manner:
    """A template, what it shows of an answer that is not the last, and what ends an answer."""

    source: str
    shown: Callable[[str], str]
    end: str
    system: bool = True


_HEADERS = (
    "{% for m in messages %}{% set text = '<|start_header_id|>' + m['role'] + '<|end_header_id|>'"
    " + '\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.first %}{% set text = bos_token +"
    " text %}{% endif %}{{ text }}{% endfor %}"
)
_INST = """{{- bos_token }}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles take turns') }}
    {%- endif %}
    {%- if m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- elif m.role == 'assistant' %}
        {{- ' ' + m.content + eos_token }}
    {%- else %}
        {{- raise_exception('only users and assistants speak') }}
    {%- endif %}
{%- endfor %}"""
_LAST_INST = """{{- bos_token }}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {%- if m.role == 'user' and loop.index0 == rest | length - 2 and system is defined %}
        {{- '[INST] ' + system + '\\n\\n' + m.content + ' [/INST]' }}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + m.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + m.content.strip() + eos_token }}
    {%- endif %}
{%- endfor %}"""
_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else "
    "m['role'] %}{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
)
_MERGED = """{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set first = '' %}
    {%- set rest = messages %}
{%- endif %}
{%- for m in rest %}
    {{- '<start_of_turn>' + m['role'] + '\\n' + (first if loop.first else '') }}
    {{- m['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor %}"""
_DEFAULT_SYSTEM = """{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nYou are a helpful thing.<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}"""
_THINKING = """{%- set last = namespace(asked=0) %}
{%- for m in messages %}
    {%- if m.role == 'user' and not m.content.startswith('<tool_response>') %}
        {%- set last.asked = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role != 'assistant' %}
        {{- m.content }}
    {%- else %}
        {%- set thought = m.reasoning_content or '' %}
        {%- set answer = m.content %}
        {%- if not thought and '</think>' in answer %}
            {%- set thought = answer.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set thought = thought.lstrip('\\n') %}
            {%- set answer = answer.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > last.asked %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + answer.lstrip('\\n') }}
        {%- else %}
            {{- answer }}
        {%- endif %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}"""
_SPLIT = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}
    {%- if m.role == 'assistant' %}
        {%- set text = m.content %}
        {%- if '</think>' in text %}{%- set text = text.split('</think>')[-1] %}{%- endif %}
        {{- '<|Assistant|>' + text + eos_token }}
    {%- endif %}
{%- endfor %}"""
_BARS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
)
_ZEPHYR = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + eos_token "
    "}}{% elif m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + eos_token }}{% else %}"
    "{{ '<|assistant|>\n' + m['content'] + eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
_NUMBERED = (
    "{% for m in messages %}{{ '<|im_start|>' ~ loop.index ~ ' of ' ~ messages | length ~ ' ' ~ "
    "m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
)

MANNERS = {
    "headers": Manner(_HEADERS, str.strip, "<|eot_id|>"),
    "inst": Manner(_INST, _kept, "</s>", system=False),
    "system in the last": Manner(_LAST_INST, str.strip, "</s>"),
    "turns": Manner(_TURNS, str.strip, "<end_of_turn>", system=False),
    "merged system": Manner(_MERGED, str.strip, "<end_of_turn>"),
    "default system": Manner(_DEFAULT_SYSTEM, _kept, "<|im_end|>"),
    "thinking": Manner(
        _THINKING,
        lambda text: text.split("</think>")[-1].lstrip("\n") if "</think>" in text else text,
        "<|im_end|>",
    ),
    "split": Manner(_SPLIT, _behind_thinking, "</s>"),
    "bars": Manner(_BARS, _kept, "<|end|>"),
    "zephyr": Manner(_ZEPHYR, _kept, "</s>"),
    "numbered": Manner(_NUMBERED, _kept, "<|im_end|>"),
}
