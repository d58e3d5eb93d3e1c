"""What this package uses of transformers without a public way.

`tests/contracts/test_private_internals.py` looks whether the installed version has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transformers.utils import chat_template_utils

if TYPE_CHECKING:
    import jinja2

__all__ = ["template_environment", "with_reasoning_aliases"]


def template_environment() -> jinja2.Environment:
    """The sandboxed environment that transformers compiles chat templates in.

    Used: `chat_template_utils._cached_compile_jinja_template`. `apply_chat_template` compiles and
    renders at once, without bounds, and hands the environment to nobody; a copy of it would miss
    names that transformers adds. If it went, importing a dataset's template raises AttributeError.
    """
    compile_template: Any = chat_template_utils._cached_compile_jinja_template  # pyright: ignore[reportPrivateUsage]
    return compile_template("").environment


def with_reasoning_aliases(messages: Sequence[Mapping[str, Any]]) -> Any:
    """A conversation as transformers hands it to a template: reasoning under all its names.

    Used: `chat_template_utils._alias_reasoning_fields`, for the reason above. If it went, rendering
    raises AttributeError.
    """
    aliased: Any = chat_template_utils._alias_reasoning_fields  # pyright: ignore[reportPrivateUsage]
    return aliased([dict(message) for message in messages])
