"""Ask a server through OpenAI's client: `openai_ask.py ADDRESS IMAGE`, answers as JSON."""

from __future__ import annotations

import base64
import json
import sys
from pathlib import Path

import openai  # pyright: ignore[reportMissingImports]

address, image = sys.argv[1:]
client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
model = client.models.list().data[0].id
url = f"data:image/png;base64,{base64.b64encode(Path(image).read_bytes()).decode()}"
content = [
    {"type": "image_url", "image_url": {"url": url}},
    {"type": "text", "text": "What is it?"},
]
asked = {"model": model, "messages": [{"role": "user", "content": content}]}
whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2, seed=3)
stream = client.chat.completions.create(
    **asked, stream=True, stream_options={"include_usage": True}
)
pieces, usages = [], [whole.usage]
for chunk in stream:
    if chunk.choices:
        pieces.append(chunk.choices[0].delta.content or "")
    usages += [chunk.usage] if chunk.usage else []
errors = {}
for name, more in {
    "model": {"model": "other"},
    "length": {"max_tokens": 10**6},
    "fetched": {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a/b"}}]}
        ]
    },
}.items():
    try:
        client.chat.completions.create(**{**asked, **more})
    except openai.APIStatusError as error:
        errors[name] = [type(error).__name__, error.code]
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "reason": whole.choices[0].finish_reason,
            "tokens": len(whole.choices[0].logprobs.content),
            "stream": "".join(pieces),
            "usage": [one.model_dump() for one in usages],
            "errors": errors,
        }
    )
)
