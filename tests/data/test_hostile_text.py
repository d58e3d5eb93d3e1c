"""Recipes and templates that unfold, nest or loop without an end are one line, soon."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lapilli.data.errors import DataError
from lapilli.data.io.yaml_text import UnusableYaml, load_yaml
from lapilli.data.text.chat_template import bounded_jinja
from lapilli.data.text.chat_template.bounded_jinja import BoundedTemplate, TemplateBound
from lapilli.data.text.chat_template.rendering import ChatWriter
from lapilli.data.text.encode import load_tokenizer
from lapilli.data.text.templates import get_template
from pipelines.check import main as check
from pipelines.cli.command import run
from tests.factories import make_tokenizer

LAUGHS = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
BAD_YAML = {
    "aliases": (LAUGHS, "aliases expand to more than"),
    "merged": (
        "m0: &m0 {a: 1}\n"
        + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12)),
        "aliases expand to more than",
    ),
    "long text": (f"a: &a {'x' * 100_000}\nb: [{', '.join(['*a'] * 1000)}]\n", "aliases expand"),
    "deep": ("exclude: " + "[" * 100_000, "nested more than 64 deep"),
    "deep mappings": ("{a: " * 5000, "nested more than 64 deep"),
    "itself": ("exclude: &e [*e]\n", "'e' holds itself"),
    "digits": ("total: " + "9" * 6000, "a number of 6000 digits"),
    "sexagesimal": ("total: 1" + ":59" * 6000, "a number of 18001 digits"),
    "code": ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
    "broken": ("a: [1, 2\nb: }", ""),
    "a wrong date": ("a: 2024-13-45\n", "a value that cannot be read"),
}


@pytest.mark.parametrize(("text", "words"), BAD_YAML.values(), ids=BAD_YAML)
def test_yaml_that_cannot_be_used_is_one_line(text: str, words: str) -> None:
    with pytest.raises(UnusableYaml) as caught:
        load_yaml(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_yaml_with_aliases_of_few_values_is_read_as_yaml_reads_it() -> None:
    text = "a: &a {x: [1, 2.5, null]}\nb: {<<: *a, y: *a}\nc: 'text'\n"
    assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize("name", ["aliases", "deep", "itself", "digits", "code"])
def test_a_recipe_that_cannot_be_used_is_one_line(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(BAD_YAML[name][0])
    assert BAD_YAML[name][1] in complaint(tmp_path, capsys)


def complaint(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        run(lambda: check([f"--config={folder / 'r.yaml'}", f"--root={folder}"]))
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


LONG_NAME = b"sources: [{name: '" + b"n" * 500_000 + b"/', annotations: a}]"


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x80", b"template: " + b"A" * 500_000, LONG_NAME], ids=range(3)
)
def test_an_error_shows_little_of_a_value(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert len(complaint(tmp_path, capsys)) < 1500


def test_a_template_file_that_unfolds_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(LAUGHS)
    with pytest.raises(DataError, match="is not YAML: its aliases expand"):
        get_template(tmp_path / "t.yaml")


# ---- chat templates ----------------------------------------------------------------------------

DOUBLED = "{%% set ns = namespace(x='xx') %%}{%% for i in range(60) %%}%s{%% endfor %%}{{ ns.x }}"
BOMBS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "times": "{{ 'x' * 10**10 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "product": "{{ 10**4000 * 10**4000 * 10**4000 }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "center": "{{ 'x' | center(10**10) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format of a format": "{{ '{:{}}'.format(1, 10**9) }}",
    "tilde": DOUBLED % "{% set ns.x = ns.x ~ ns.x %}",
    "plus": DOUBLED % "{% set ns.x = ns.x + ns.x %}",
    "block": DOUBLED % "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}",
    "list": DOUBLED % "{% set ns.x = [ns.x, ns.x] %}",
    "tuple": DOUBLED % "{% set ns.x = (ns.x, ns.x) %}",
    "dict": DOUBLED % "{% set ns.x = {'a': ns.x, 'b': ns.x} %}",
    "replace": DOUBLED % "{% set ns.x = ns.x | replace('', 'xxxxxxxxxxxxxxxx') %}",
    "replace method": DOUBLED % "{% set ns.x = ns.x.replace('', 'xxxxxxxxxxxxxxxx') %}",
    "join": "{% set x = 'a' * 10000000 %}{{ range(10000) | map('string') | join(x) }}",
    "join method": "{% set x = 'a' * 10000000 %}{{ x.join(range(10000) | map('string') | list) }}",
    "indent": "{% set x = 'a\n' * 1000000 %}{{ x | indent(1000000) }}",
    "tojson": "{{ messages | tojson(indent=10**9) }}",
    "blind text": "{{ lipsum(n=100000) }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_a_template_that_takes_too_much_is_stopped(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_jinja, "MOST_STEPS", 20_000)
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(TemplateBound):
        BoundedTemplate(source).render(said, {})


@pytest.mark.parametrize("name", ["loops", "times", "list"])
def test_a_tokenizers_template_that_takes_too_much_is_one_line(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded_jinja, "MOST_STEPS", 20_000)
    tokenizer: Any = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    with pytest.raises(DataError, match="the chat template cannot be used: it ") as caught:
        ChatWriter(tokenizer, BOMBS[name], {}, train_all=False)
    assert "\n" not in str(caught.value)


def test_a_bounded_template_writes_what_transformers_writes(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(make_tokenizer(tmp_path / "tokenizer"))
    source = (
        "{{ bos_token }}{% set ns = namespace(n=0, seen=[]) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% set ns.seen = ns.seen + [m.role] %}"
        "{{ loop.index ~ ':' ~ m['role'] | upper }} {{ '%s|%d' % (m.content | trim, ns.n) }}"
        "{% if m.reasoning_content is defined %}<{{ m.reasoning_content }}>{% endif %}"
        "{{ '{:>9}'.format(m.role) }}{{ m.content.split('a')[-1] }}{{ (m.role, 1) }}{% endfor %}"
        "{{ ns.seen | join(',') }}{{ ns.seen | tojson }}"
        "{{ messages[::-1][0].role.replace('s', 'z') }}"
        "{% macro f(x, y=2) %}{{ x * y }}{% endmacro %}{{ f('ab') }}{{ dict(a=1) }}{{ [1] * 3 }}"
    )
    said = [
        {"role": "user", "content": " a cat "},
        {"role": "assistant", "content": "b", "reasoning_content": "hm"},
    ]
    expected = tokenizer.apply_chat_template(said, chat_template=source, tokenize=False)
    assert BoundedTemplate(source).render(said, tokenizer.special_tokens_map) == expected
