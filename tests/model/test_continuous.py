"""Rows that join and leave are continued as each is alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lapilli.model.config import Decoding, LanguageConfig
from lapilli.model.continuous import ContinuousBatch
from lapilli.model.generate import generate
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.train.small_run import small_run

SHAPE = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 256,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300, "n_positions": 256}
FAMILIES = {
    "llama": SHAPE, "mistral": SHAPE | {"sliding_window": 6}, "gpt2": GPT2,
    "qwen3": SHAPE | {"head_dim": 8},
}  # fmt: skip
GREEDY = Decoding(max_new_tokens=9)
DRAWN = Decoding(max_new_tokens=9, temperature=1.0, top_p=0.9, seed=5)


def made(kind: str) -> VisionLanguageModel:
    config = small_run(Path(), Path()).model
    language = LanguageConfig(model_type=kind, settings=FAMILIES[kind])
    model = build_model(replace(config, language=language)).eval()
    with torch.no_grad():  # random weights repeat one token; larger ones tell answers apart
        for one in model.language.parameters():
            one.mul_(3 if one.ndim > 1 else 1)
    return model


def prompts_of(count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    rng = np.random.default_rng(3)
    prompts, pixels = [], []
    for number in range(count):
        ids = rng.integers(5, 290, 4 + 3 * number).astype(np.int64)
        images = number % 2
        if images:
            ids[2] = -200
        prompts.append(ids)
        pixels.append(rng.integers(0, 255, (images, 32, 32, 3), np.uint8))
    return prompts, pixels


@pytest.mark.parametrize("kind", FAMILIES)
def test_rows_that_join_and_leave_are_answered_as_alone(kind: str) -> None:
    model = made(kind)
    prompts, pixels = prompts_of(5)
    kinds = [GREEDY, DRAWN, GREEDY, replace(DRAWN, seed=6), GREEDY]
    alone = [
        generate(model, [ids], [images], how)[0]
        for ids, images, how in zip(prompts, pixels, kinds, strict=True)
    ]
    assert len({tuple(answer) for answer in alone}) == 5
    batch = ContinuousBatch(model)
    found: dict[int, list[int]] = {}
    waiting = list(zip(prompts, pixels, kinds, strict=True))
    while waiting or len(batch):
        tokens = batch.step()
        if waiting and batch.has_room:  # one joins at every step, while others run
            tokens.append(batch.add(*waiting.pop(0)))
        for token in tokens:
            found.setdefault(token.row, []).append(token.token_id)
            if len(found[token.row]) == 9:
                batch.remove(token.row)
    assert [found[row] for row in range(5)] == alone


def test_log_probabilities_are_those_of_one_forward() -> None:
    model = made("llama")
    prompts, pixels = prompts_of(2)
    batch = ContinuousBatch(model)
    first = batch.add(prompts[1], pixels[1], GREEDY, wants_logprobs=True)
    batch.add(prompts[0], pixels[0], GREEDY)
    second, other = batch.step()
    assert first.logprobs_V is not None
    assert second.logprobs_V is not None
    assert other.logprobs_V is None
    longer = np.append(prompts[1], first.token_id)
    again = ContinuousBatch(model).add(longer, pixels[1], GREEDY, wants_logprobs=True)
    assert again.logprobs_V is not None
    torch.testing.assert_close(second.logprobs_V, again.logprobs_V)
    assert float(second.logprobs_V.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    assert second.token_id == int(second.logprobs_V.argmax())


def test_a_row_that_ends_leaves_its_columns() -> None:
    """The longest row's padding goes with it, or a server's cache would only grow."""
    model = made("llama")
    prompts, pixels = prompts_of(5)
    batch = ContinuousBatch(model)
    long = batch.add(prompts[4], pixels[4], GREEDY)
    short = batch.add(prompts[0], pixels[0], GREEDY)
    batch.remove(long.row)
    batch.step()
    assert batch._cache.get_seq_length() == len(prompts[0]) + 1  # pyright: ignore[reportPrivateUsage]
    batch.remove(short.row)
    assert len(batch) == 0
    assert batch.step() == []


def test_a_decoder_that_keeps_a_state_takes_one_row() -> None:
    model = made("llama")
    model.language.config.layer_types = ["linear_attention", "full_attention"]
    prompts, pixels = prompts_of(1)
    batch = ContinuousBatch(model)
    del model.language.config.layer_types  # Llama's own cache is none of such a decoder
    assert batch.has_room
    found = [batch.add(prompts[0], pixels[0], GREEDY).token_id]
    assert not batch.has_room
    found += [batch.step()[0].token_id for _ in range(8)]
    assert found == generate(model, prompts, pixels, GREEDY)[0]
