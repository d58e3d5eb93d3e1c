"""transformers' LLaVA folder: its own classes must read what is written, to the bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlavaForConditionalGeneration

from lapilli.model.errors import ModelError
from lapilli.model.interop.hf import read_facts, read_hf, write_hf
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model.test_vlm import CONFIG, LLAMA, TOKENS


def logits(model: VisionLanguageModel, ids: np.ndarray[Any, Any], pixels: torch.Tensor) -> Any:
    expanded = np.repeat(ids, np.where(ids < 0, TOKENS, 1))
    slots = expanded < 0
    index = np.where(slots, np.cumsum(slots) - 1, -1).astype(np.int32)[None]
    embedded = model.embed(
        torch.from_numpy(np.where(slots, 0, expanded))[None], torch.from_numpy(index), pixels
    )
    return model.language(inputs_embeds=embedded).logits, expanded


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("image_id", [60, 64, 70])
def test_stock_transformers_computes_the_same_logits(
    tmp_path: Path, image_id: int, tied: bool
) -> None:
    language = replace(CONFIG.language, settings={**LLAMA, "tie_word_embeddings": tied})
    model = build_model(replace(CONFIG, language=language)).eval()
    write_hf(model, tmp_path, image_token_id=image_id)
    twin: Any = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = np.array([1, 5, -200, 9, 12, -200, 3], np.int64)
    pixels = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
    with torch.inference_mode():
        ours, expanded = logits(model, ids, pixels)
        mean, std = torch.tensor([model.config.vision.mean, model.config.vision.std])
        theirs = twin(
            input_ids=torch.from_numpy(np.where(expanded < 0, image_id, expanded))[None],
            pixel_values=((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2),
        ).logits
    torch.testing.assert_close(theirs[..., :64], ours, rtol=1e-5, atol=1e-5)
    if image_id >= 64:
        assert (theirs[..., 64:] <= ours.amax(-1, keepdim=True)).all()


def test_there_and_back_every_tensor_is_the_same(tmp_path: Path) -> None:
    model = build_model(CONFIG).eval()
    write_hf(model, tmp_path, image_token_id=70, facts={"template": "v1"}, shard_size="10KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    back = read_hf(tmp_path)
    assert read_facts(tmp_path)["template"] == "v1"
    before, after = model.state_dict(), back.state_dict()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("projector", ["linear", "mlp3x_gelu"])
def test_a_projector_that_transformers_lacks_is_named(tmp_path: Path, projector: str) -> None:
    model = build_model(replace(CONFIG, projector=projector))
    with pytest.raises(ModelError, match=f"{projector} has no counterpart"):
        write_hf(model, tmp_path, image_token_id=60)


def test_a_folder_of_something_else_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded; expected a folder"):
        read_hf(tmp_path)
