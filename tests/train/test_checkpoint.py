"""A checkpoint's parts that need no run."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Literal

import pytest
from safetensors.torch import save

from lapilli.model.trainable import trainable_parameters
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint import frozen_fingerprint
from tests.train.tiny import model_config


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_frozen_weights_fingerprint_is_over_their_bytes(dtype: Literal["fp32", "bf16"]) -> None:
    model = build_model(replace(model_config("projector"), dtype=dtype))
    learns = trainable_parameters(model).keys()
    digest = hashlib.sha256()
    for name, value in sorted(model.named_parameters()):
        if name not in learns:
            # a safetensors file of one tensor ends with its bytes
            digest.update(name.encode() + save({"x": value.detach()})[-value.nbytes :])
    assert frozen_fingerprint(model, learns) == digest.hexdigest()
