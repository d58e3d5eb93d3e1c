"""Liger's kernels without a GPU: under Triton's interpreter, chosen, and refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lapilli.model.errors import ModelError
from lapilli.model.kernels.choice import choose_kernels
from lapilli.model.vlm import build_model
from tests.model import twins

CASES = Path(__file__).with_name("liger_cases.py")
pytest.importorskip("liger_kernel", reason="liger-kernel (extra `liger`, on Linux) is absent")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `make gpu-test` runs them")
def test_the_cases_pass_under_the_interpreter() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert re.search(r"\d\d passed", found.stdout)
    assert "skipped" not in found.stdout


CONFIG = twins.config(kernels="auto")


@pytest.mark.parametrize(
    ("values", "family", "device", "note"),
    [
        ({}, "llama", "cuda", "kernels: merge triton, layers liger, loss torch"),
        ({}, "llama", "cpu", "kernels: merge torch, layers torch, loss torch"),
        ({}, "llama", "hpu", "kernels: merge torch, layers torch, loss torch"),
        ({}, "gpt2", "cuda", "kernels: merge triton, layers torch (Liger has no gpt2), loss torch"),
        ({"kernels": "torch", "merge": "torch"}, "llama", "cuda",
         "kernels: merge torch, layers torch, loss torch"),
        ({"kernels": "liger"}, "llama", "cuda", "kernels: merge triton, layers liger, loss liger"),
        ({"compile": "blocks"}, "llama", "cuda",
         "kernels: merge triton, layers compiled, loss torch"),
    ],
)  # fmt: skip
def test_what_the_settings_come_to(
    values: dict[str, Any], family: str, device: str, note: str
) -> None:
    assert choose_kernels(replace(CONFIG, **values), family, device).note == note


@pytest.mark.parametrize(
    ("values", "family", "device", "words"),
    [
        ({"kernels": "liger"}, "llama", "cpu", "needs a CUDA device, this is cpu; set"),
        ({"kernels": "liger"}, "gpt2", "cuda", "Liger has no gpt2, it knows gemma, .*; set"),
        ({"kernels": "liger", "compile": "blocks"}, "llama", "cuda", "set model.kernels: auto or"),
    ],
)
def test_what_cannot_run_is_one_line(
    values: dict[str, Any], family: str, device: str, words: str
) -> None:
    with pytest.raises(ModelError, match=words) as refused:
        choose_kernels(replace(CONFIG, **values), family, device)
    assert "\n" not in str(refused.value)


def test_on_a_cpu_auto_computes_what_torch_does_and_liger_is_refused() -> None:
    batch = twins.batch((1, 0))
    losses = [twins.forward(build_model(twins.config(kernels=k)), batch) for k in ("torch", "auto")]
    assert torch.equal(*losses)
    model = build_model(twins.config(kernels="liger"))
    with pytest.raises(ModelError, match=r"liger needs a CUDA device.*on cpu; set model.kernels"):
        twins.forward(model, batch)


def test_a_decoder_that_liger_does_not_know_is_refused_when_it_is_built() -> None:
    with pytest.raises(ModelError, match="Liger has no cohere, it knows"):
        build_model(twins.config("clip", "cohere", kernels="liger"))
