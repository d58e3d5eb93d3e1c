"""Decoding: nothing but weights and settings decides, drawn tokens, watching, positions."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lapilli.model.config import Decoding, LanguageConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import Draws, generate, generate_greedy, next_logits
from lapilli.model.parts.positions import Positions, positions_of
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model.test_vlm import CONFIG, samples

ASKED = samples(11, (1, 0, 2))
PROMPTS = [s.input_ids.astype(np.int64) for s in ASKED]
PIXELS = [s.pixels for s in ASKED]
# One value for each way in which a base model may want to be decoded.
OF_THE_BASE: dict[str, Any] = {
    "do_sample": True, "temperature": 0.3, "top_k": 3, "top_p": 0.5, "min_p": 0.2,
    "typical_p": 0.4, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "repetition_penalty": 4.0,
    "no_repeat_ngram_size": 1, "suppress_tokens": [*range(20)], "begin_suppress_tokens": [21, 22],
    "bad_words_ids": [[30], [31]], "sequence_bias": [[[40], 50.0]], "forced_bos_token_id": 7,
    "forced_eos_token_id": 8, "min_length": 5, "min_new_tokens": 5, "max_length": 3,
    "exponential_decay_length_penalty": [1, 2.0], "renormalize_logits": True, "eos_token_id": [9],
    "num_beams": 2, "num_return_sequences": 2, "length_penalty": 3.0, "max_time": 1e-9,
    "stop_strings": ["a"], "return_dict_in_generate": True, "output_scores": True,
    "cache_implementation": "static", "use_cache": False, "guidance_scale": 2.0,
    "prompt_lookup_num_tokens": 2, "low_memory": True, "penalty_alpha": 0.6,
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> VisionLanguageModel:
    return build_model(CONFIG).eval()


@torch.inference_mode()
def embedded_by_hand(model: VisionLanguageModel, row: int) -> torch.Tensor:
    """A prompt with its images' rows, alone and without padding."""
    ids, images = PROMPTS[row], torch.from_numpy(PIXELS[row])
    expanded = np.repeat(ids, np.where(ids < 0, model.vision.num_tokens, 1))
    slots = expanded < 0
    index = np.where(slots, np.cumsum(slots) - 1, -1).astype(np.int32)[None]
    return model.embed(
        torch.from_numpy(np.where(slots, 0, expanded))[None], torch.from_numpy(index), images
    )


def test_next_logits_are_those_of_each_prompt_alone(model: VisionLanguageModel) -> None:
    found = next_logits(model, PROMPTS, PIXELS)
    assert found.shape == (len(PROMPTS), 64)
    for row in range(len(PROMPTS)):
        with torch.inference_mode():
            alone = model.language(inputs_embeds=embedded_by_hand(model, row)).logits[0, -1]
        torch.testing.assert_close(found[row], alone.float(), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def argmax_by_hand(model: VisionLanguageModel, row: int, count: int, end: int = 63) -> list[int]:
    """The likeliest token again and again, from whole sequences' logits, without a cache."""
    embedded = embedded_by_hand(model, row)
    said: list[int] = []
    for _ in range(count):
        newest = int(model.language(inputs_embeds=embedded).logits[0, -1].argmax())
        if newest == end:
            break
        said.append(newest)
        more = model.language.get_input_embeddings()(torch.tensor([[newest]]))
        embedded = torch.cat([embedded, more], 1)
    return said


def test_greedy_is_the_likeliest_token_whatever_the_base_model_brings(
    model: VisionLanguageModel,
) -> None:
    """Each of the base's wishes by itself, and all those together that go together."""
    by_hand = [argmax_by_hand(model, row, 6) for row in range(3)]
    own = model.language.generation_config
    together = {k: v for k, v in OF_THE_BASE.items() if k not in ("num_beams", "guidance_scale")}
    for wishes in [{name: value} for name, value in OF_THE_BASE.items()] + [together]:
        base = GenerationConfig()
        for name, value in wishes.items():
            setattr(base, name, value)
        model.language.generation_config = base
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                found = generate_greedy(model, PROMPTS, PIXELS, end_id=63, max_new_tokens=6)
            assert model.language.generation_config is base
        finally:
            model.language.generation_config = own
        assert found == by_hand, wishes


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_a_base_models_folder_does_not_decide(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As published models have it, and as those of transformers 4 have it in `config.json`."""
    torch.manual_seed(0)
    settings = CONFIG.language.settings
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", **settings, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    answers: list[list[list[int]]] = []
    for wishes in ({}, {"repetition_penalty": 5.0, "do_sample": True, "top_k": 2}):
        path = tmp_path / name
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        path.write_text(json.dumps({**before, **wishes}), encoding="utf-8")
        config = replace(CONFIG, language=LanguageConfig(pretrained=str(tmp_path)))
        loaded = build_model(config).eval()
        assert not wishes or loaded.language.generation_config.repetition_penalty == 5.0
        capfd.readouterr()
        for decoding in (Decoding(8), Decoding(8, temperature=1.0)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answers.append(generate(loaded, PROMPTS, PIXELS, decoding, end_ids=[63]))
        assert capfd.readouterr() == ("", "")
    assert answers[:2] == answers[2:]


def test_a_batch_answers_as_each_prompt_alone(model: VisionLanguageModel) -> None:
    for decoding in (Decoding(6), Decoding(6, temperature=1.0, top_p=0.9)):
        together = generate(model, PROMPTS, PIXELS, decoding, end_ids=[63])
        alone = [
            generate(model, [p], [x], decoding, end_ids=[63])[0]
            for p, x in zip(PROMPTS, PIXELS, strict=True)
        ]
        turned = generate(model, PROMPTS[::-1], PIXELS[::-1], decoding, end_ids=[63])
        assert together == alone == turned[::-1]


def test_the_same_question_draws_the_same_answer_and_another_draws_its_own(
    model: VisionLanguageModel,
) -> None:
    drawn = Decoding(8, temperature=1.0)
    found = generate(model, [PROMPTS[0]] * 5, [PIXELS[0]] * 5, drawn, end_ids=[63])
    assert all(one == found[0] for one in found)
    other_image = generate(model, [PROMPTS[0]], [255 - PIXELS[0]], drawn, end_ids=[63])
    other_seed = generate(model, [PROMPTS[0]], [PIXELS[0]], replace(drawn, seed=1), end_ids=[63])
    assert len({tuple(one) for one in (found[0], other_image[0], other_seed[0])}) == 3
    shorter = generate(model, [PROMPTS[0]], [PIXELS[0]], replace(drawn, max_new_tokens=3))
    assert shorter[0] == generate(model, [PROMPTS[0]], [PIXELS[0]], drawn)[0][:3]


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_drawn_tokens_follow_the_models_own_distribution(top_p: float) -> None:
    count, temperature = 4000, 0.7
    logits = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    draws = Draws(range(count), Decoding(1, temperature, top_p))
    chosen = draws(torch.zeros(count, 0), logits.expand(count, -1))
    assert (torch.isfinite(chosen).sum(-1) == 1).all()  # one token a row is left
    shares = chosen.argmax(-1).bincount(minlength=64).double() / count
    expected = np.exp(logits[0].double().numpy() / temperature)
    expected /= expected.sum()
    order = np.argsort(-expected)
    kept = order[: int(np.searchsorted(np.cumsum(expected[order]), top_p)) + 1]
    expected = np.where(np.isin(np.arange(64), kept), expected, 0.0)
    expected /= expected.sum()
    assert (shares - torch.from_numpy(expected)).abs().max() < 5 * (0.25 / count) ** 0.5
    assert not shares[torch.from_numpy(expected == 0)].any()


def test_a_narrow_top_p_and_a_low_temperature_are_greedy(model: VisionLanguageModel) -> None:
    greedy = generate_greedy(model, PROMPTS, PIXELS, end_id=63, max_new_tokens=6)
    before = torch.random.get_rng_state()
    for close in (Decoding(6, temperature=1.0, top_p=1e-6), Decoding(6, temperature=1e-6)):
        assert generate(model, PROMPTS, PIXELS, close, end_ids=[63]) == greedy
    assert torch.equal(before, torch.random.get_rng_state())


def test_what_is_watched_is_the_answers(model: VisionLanguageModel) -> None:
    seen: list[list[int]] = [[], [], []]

    def watch(row: int, newest: int) -> bool:
        seen[row].append(newest)
        return False

    assert generate(model, PROMPTS, PIXELS, Decoding(5), end_ids=[63], watch=watch) == seen


def test_a_watch_ends_one_answer_and_not_the_others(model: VisionLanguageModel) -> None:
    free = generate(model, PROMPTS, PIXELS, Decoding(6), end_ids=[63])
    steps = [0, 0, 0]

    def watch(row: int, newest: int) -> bool:
        del newest
        steps[row] += 1
        return row == 0 and steps[row] == 2

    found = generate(model, PROMPTS, PIXELS, Decoding(6), end_ids=[63], watch=watch)
    assert found == [free[0][:2], *free[1:]]
    assert steps[0] == 2  # not asked again


@pytest.mark.parametrize(
    ("field", "value"), [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0)]
)
def test_a_wrong_setting_is_named(field: str, value: float) -> None:
    with pytest.raises(ModelError, match=f"{field}: {value}"):
        Decoding(**{field: value})  # type: ignore[arg-type]


# ---- positions ---------------------------------------------------------------------------------

LIMIT = 16
SMALL = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "intermediate_size": 48, "ffn_dim": 48,
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": LIMIT, "n_positions": LIMIT,
    "max_seq_len": LIMIT, "word_embed_proj_dim": 32, "rotary_dim": 4,
    "attention_types": [[["global", "local"], 1]], "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FIXED = "gpt2 opt gpt_neo gptj codegen mpt biogpt gpt_bigcode ctrl openai-gpt"
ROTARY = "llama mistral qwen2 gemma gemma2 phi stablelm gpt_neox cohere olmo starcoder2"
BOUNDLESS = "bloom mamba"


@pytest.mark.parametrize("family", [*FIXED.split(), *ROTARY.split(), *BOUNDLESS.split()])
def test_a_family_goes_beyond_its_positions_or_not(family: str) -> None:
    """Whether the family's own decoder raises is what `positions_of` says of it."""
    known = {k: v for k, v in SMALL.items() if hasattr(AutoConfig.for_model(family), k)}
    language: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **known))
    found = positions_of(language)
    assert found == (None if family in BOUNDLESS else Positions(LIMIT, family in FIXED.split()))

    def run(length: int) -> None:
        embedded = torch.zeros(1, length, language.get_input_embeddings().embedding_dim)
        ids = torch.arange(length)[None]
        with torch.no_grad():
            given = {} if family in ("bloom", "mpt", "mamba") else {"position_ids": ids}
            language.get_decoder()(inputs_embeds=embedded, use_cache=False, **given)

    run(LIMIT)
    if family in FIXED.split():
        with pytest.raises((IndexError, RuntimeError)):
            run(LIMIT + 1)
    else:
        run(LIMIT + 1)


@pytest.mark.parametrize(
    ("rope", "limit"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 64),
        ({"rope_type": "dynamic", "factor": 2.0}, 32),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "default"}, 16),
    ],
)
def test_scaled_rotary_positions_count_as_scaled(rope: dict[str, Any], limit: int) -> None:
    settings = {**CONFIG.language.settings, "max_position_embeddings": 16}
    config = AutoConfig.for_model("llama", **settings, rope_parameters={"rope_theta": 1e4, **rope})
    assert positions_of(AutoModelForCausalLM.from_config(config)) == Positions(limit, False)


def build(family: str, **settings: Any) -> VisionLanguageModel:
    language = LanguageConfig(model_type=family, settings={**settings, "vocab_size": 64})
    return build_model(replace(CONFIG, language=language)).eval()


def test_a_prompt_beyond_learnt_positions_is_one_line_with_both_numbers() -> None:
    model = build("gpt2", n_embd=32, n_layer=1, n_head=2, n_positions=24)
    ids = np.array([1, -200, 5, 7])
    length = 3 + model.vision.num_tokens
    room = 24 - length
    pixels = PIXELS[0][:1]
    generate(model, [ids], [pixels], Decoding(room))
    with pytest.raises(ModelError, match=rf"prompt 0: {length} tokens and up to .* 24 positions"):
        generate(model, [ids], [pixels], Decoding(room + 1))


def test_a_prompt_beyond_rotary_positions_is_said_once() -> None:
    model = build_model(
        replace(
            CONFIG,
            language=LanguageConfig(
                settings={**CONFIG.language.settings, "max_position_embeddings": 8}
            ),
        )
    ).eval()
    with pytest.warns(UserWarning, match="has 8 positions") as told:
        generate(model, PROMPTS, PIXELS, Decoding(2))
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, PROMPTS, PIXELS, Decoding(2))
