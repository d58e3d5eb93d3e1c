"""Validate each record for a build: its own form, its template, LLaVA's rules."""

from __future__ import annotations

from typing import Any

from lapilli.data.record import Reason, Record, Verdict
from lapilli.data.sources.validation import Rules, check_record
from lapilli.data.text.encode import template_refusal
from lapilli.data.text.llava_compat import check_as_llava
from lapilli.data.text.rendering import mark_images
from lapilli.data.text.templates import Template

__all__ = ["record_rules"]


def record_rules(template: Template, tokenizer: Any, compat: str | None) -> Rules:
    """The rules of a build: how its template, and LLaVA if it is followed, take each record.

    Args:
        template: The template, bound to the tokenizer.
        tokenizer: The tokenizer; a template made of frames does not need it.
        compat: The config's.

    Raises:
        DataError: A chat template that can write no conversation.
    """
    if compat == "llava":
        return lambda record: check_as_llava(mark_images(record, template), template)
    refusal = template_refusal(tokenizer, template)
    writes_thinking = "reasoning_content" in template.chat

    def rules(record: Record) -> tuple[Record, Verdict]:
        record = mark_images(record, template)
        verdict = check_record(record, writes_thinking=writes_thinking)
        if verdict.kept and (reason := refusal(record)):
            detail = f"the chat template refuses it: {reason}"
            verdict = Verdict(Reason.TEMPLATE_REFUSES, detail)
        return record, verdict

    return rules
