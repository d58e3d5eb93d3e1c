"""Decoding: drawn tokens, streaming, stopping. Greedy equality stands in test_vlm."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from lapilli.model.errors import ModelError
from lapilli.model.generate import Decoding, generate, generate_greedy
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model.test_vlm import CONFIG, samples

ASKED = samples(11, (1, 0, 2))
PROMPTS = [s.input_ids.astype(np.int64) for s in ASKED]
PIXELS = [s.pixels for s in ASKED]


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return build_model(CONFIG).eval()


def test_a_batch_answers_as_each_prompt_alone(model: VisionLanguageModel) -> None:
    together = generate_greedy(model, PROMPTS, PIXELS, end_id=63, max_new_tokens=6)
    alone = [
        generate_greedy(model, [p], [x], end_id=63, max_new_tokens=6)[0]
        for p, x in zip(PROMPTS, PIXELS, strict=True)
    ]
    assert together == alone


def test_drawn_tokens_follow_the_models_own_distribution(model: VisionLanguageModel) -> None:
    count = 3000
    found = generate(
        model, [PROMPTS[1]] * count, [PIXELS[1]] * count, Decoding(1, temperature=0.7), end_ids=[63]
    )
    ids = torch.from_numpy(PROMPTS[1])[None]
    expected = torch.softmax(model.language(ids).logits[0, -1].double() / 0.7, -1)
    drawn = Counter(row[0] if row else 63 for row in found)
    shares = torch.tensor([drawn[i] / count for i in range(64)], dtype=torch.double)
    assert (shares - expected).abs().max() < 5 * (0.25 / count) ** 0.5


def test_a_narrow_top_p_is_greedy_and_the_seed_decides_the_rest(model: VisionLanguageModel) -> None:
    greedy = generate_greedy(model, PROMPTS, PIXELS, end_id=63, max_new_tokens=6)
    narrow = Decoding(6, temperature=1.0, top_p=1e-6)
    assert generate(model, PROMPTS, PIXELS, narrow, end_ids=[63]) == greedy
    before = torch.random.get_rng_state()
    first, again, another = (
        generate(model, PROMPTS, PIXELS, Decoding(6, 1.0, 1.0, seed), end_ids=[63])
        for seed in (1, 1, 2)
    )
    assert first == again != another
    assert torch.equal(before, torch.random.get_rng_state())


def test_streamed_tokens_are_the_answers(model: VisionLanguageModel) -> None:
    seen: list[list[int]] = []
    found = generate(
        model, PROMPTS, PIXELS, Decoding(5), end_ids=[63], on_tokens=lambda ids: seen.append(ids)
    )
    for row, ids in enumerate(found):
        assert [step[row] for step in seen][: len(ids)] == ids


def test_a_stop_ends_one_answer_and_not_the_others(model: VisionLanguageModel) -> None:
    free = generate(model, PROMPTS, PIXELS, Decoding(6), end_ids=[63])
    ends = free[0][:2]
    found = generate(
        model, PROMPTS[:2], PIXELS[:2], Decoding(6), end_ids=[63], stop=lambda ids: ids == ends
    )
    assert found[0] == ends
    assert found[1] == free[1]


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0)]
)
def test_a_wrong_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"{field}: {value}"):
        Decoding(**{field: value})  # type: ignore[arg-type]
