"""What lies frozen below a run is compared with what it was, by value."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file, save_file
from torch import Tensor

from lapilli.model.config import LoraConfig
from lapilli.model.vlm import build_model
from lapilli.train.checkpoint import frozen
from lapilli.train.checkpoint.frozen import digest
from lapilli.train.config import RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import load_trained
from lapilli.train.worker.compatibility import build_run
from tests.train.made_run import configured, made_run, summed_loss
from tests.train.tiny import VOCABULARY, model_config

LORA = LoraConfig(rank=2, alpha=4, dropout=0.0)
shapes = hnp.array_shapes(max_dims=3, max_side=9)


def expected_digest(values: np.ndarray) -> str:
    """In numpy: the upper half of fp32's bits, rounded to even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    rounded[np.isnan(values)] = 0x7FC0
    rounded[(rounded & 0x7FFF) == 0] = 0
    return hashlib.sha256(str(values.shape).encode() + rounded.tobytes()).hexdigest()[:32]


@given(hnp.arrays(np.float32, shapes, elements=st.floats(width=32)))
def test_a_digest_is_of_the_values_rounded_to_bf16(values: np.ndarray) -> None:
    held = torch.from_numpy(values)
    expected = expected_digest(values)
    assert digest(held) == expected
    assert digest(held.bfloat16()) == expected
    assert digest(held.t() if held.dim() == 2 else held) == (
        expected_digest(values.T) if held.dim() == 2 else expected
    )


@given(hnp.arrays(np.float16, shapes, elements=st.floats(width=16)))
def test_numbers_of_fp16_have_the_digest_of_the_same_in_fp32(values: np.ndarray) -> None:
    expected = expected_digest(values.astype(np.float32))
    assert digest(torch.from_numpy(values)) == expected


def test_pieces_make_no_difference_and_shapes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(6, 5)
    whole = digest(values)
    monkeypatch.setattr(frozen, "PIECE", 7)
    assert digest(values) == whole
    assert digest(values.reshape(5, 6)) != whole
    assert digest(values + 1) != whole


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A language model with weights, wide enough for layers in 4 bits."""
    model = model_config("language")
    settings = {**model.language.settings, "hidden_size": 64, "intermediate_size": 128}
    made = replace(model, seed=11, language=replace(model.language, settings=settings))
    build_model(made).language.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def change(base: Path, how: Callable[[str, Tensor], Tensor]) -> None:
    """Other weights in the same file."""
    path = base / "model.safetensors"
    tensors = {name: how(name, value).contiguous() for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def run_on(base: Path, output: Path, **values: Any) -> RunConfig:
    language: dict[str, Any] = {"pretrained": str(base), "settings": {}}
    language.update(values.pop("language", {}))
    return configured(output, *values.pop("parts", ("projector",)), language=language, **values)


@pytest.mark.parametrize(
    "held",
    [
        {"model": {"dtype": "bf16"}, "precision": "bf16"},
        {"language": {"vocab_size": VOCABULARY + 8}},
        {"parts": ("projector", "language"), "lora": LORA},
        {"parts": ("projector", "language"), "lora": LORA, "language": {"vocab_size": 56}},
        pytest.param(
            {"parts": ("projector", "language"), "lora": LORA, "language": {"quantize": "nf4"}},
            marks=pytest.mark.skipif(
                importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is absent"
            ),
        ),
    ],
)
def test_a_second_stage_may_hold_the_same_base_otherwise(
    held: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    first = run_on(base, tmp_path / "a")
    made_run(first)
    second = run_on(base, tmp_path / "b", init_from=tmp_path / "a", **held)
    began = build_run(second)
    assert began.start is not None
    assert began.frozen == build_run(first).frozen
    ended = made_run(second)
    assert summed_loss(load_trained(tmp_path / "b").model) == summed_loss(ended)


def test_a_base_that_changed_is_refused_wherever_the_run_is_opened(
    base: Path, tmp_path: Path
) -> None:
    config = run_on(base, tmp_path / "a", parts=("projector", "language"), lora=LORA)
    made_run(config)
    saved = sorted(str(p) for p in (tmp_path / "a").rglob("*"))
    change(base, lambda name, v: v + 0.05 * torch.randn(v.shape) if "q_proj" in name else v)
    was = frozen.fingerprint(
        json.loads((tmp_path / "a/checkpoints/step-00000001/state.json").read_text())["frozen"][
            "weights"
        ]
    )
    words = (
        rf"was trained beside other frozen weights: language\.pretrained {base} has changed since "
        rf"\(language\.model\.layers\.0\.self_attn\.q_proj\.weight and 1 more differ; fingerprint "
        rf"was {was[:12]}, is [0-9a-f]{{12}}\); put the weights back"
    )
    with pytest.raises(TrainError, match=f"^{tmp_path}/a {words}"):
        load_trained(tmp_path / "a")
    milestone = tmp_path / "a" / "checkpoints" / "step-00000001"
    (milestone / "config.json").write_text((tmp_path / "a" / "config.json").read_text())
    with pytest.raises(TrainError, match=words):
        load_trained(milestone)
    with pytest.raises(TrainError, match=f"^init_from: .*{words}"):
        build_run(run_on(base, tmp_path / "b", init_from=tmp_path / "a"))
    assert sorted(str(p) for p in (tmp_path / "a").rglob("*") if p.name != "config.json") == [
        path for path in saved if not path.endswith("config.json")
    ]


def test_a_stage_whose_own_base_changed_is_refused_though_its_start_is_as_it_was(
    base: Path, tmp_path: Path
) -> None:
    made_run(run_on(base, tmp_path / "a"))
    second = run_on(
        base, tmp_path / "b", parts=("projector", "language"), lora=LORA, init_from=tmp_path / "a"
    )
    made_run(second)
    change(base, lambda name, v: -v if name == "lm_head.weight" else v)
    words = r"b was trained beside other frozen weights: .*\(language\.lm_head\.weight differs; "
    with pytest.raises(TrainError, match=words):
        load_trained(tmp_path / "b")


def test_numbers_below_bf16s_precision_and_weights_that_were_replaced_are_no_change(
    base: Path, tmp_path: Path
) -> None:
    change(base, lambda name, v: v.bfloat16().float())
    adapted = run_on(base, tmp_path / "a", parts=("projector", "language"), lora=LORA)
    whole = run_on(base, tmp_path / "b", parts=("projector", "language"))
    made_run(adapted)
    ended = summed_loss(made_run(whole))
    change(base, lambda name, v: v * (1 + 2**-10))
    load_trained(tmp_path / "a")
    change(base, lambda name, v: v + 1)
    assert summed_loss(load_trained(tmp_path / "b").model) == ended


def test_the_tower_and_random_weights_are_named(base: Path, tmp_path: Path) -> None:
    config = run_on(base, tmp_path / "a", parts=("projector",))
    made_run(config)
    other = replace(config, model=replace(config.model, seed=9))
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(
            json.loads((tmp_path / "a" / "config.json").read_text())
            | {"model": json.loads(json.dumps(other.model, default=vars))}
        )
    )
    with pytest.raises(
        TrainError,
        match=r"the vision of random weights \(model\.seed 3\) has changed since \(vision",
    ):
        load_trained(tmp_path / "a")


def test_a_fingerprint_of_another_form_is_said_to_be_one(base: Path, tmp_path: Path) -> None:
    made_run(run_on(base, tmp_path / "a"))
    path = tmp_path / "a" / "checkpoints" / "step-00000001" / "state.json"
    state = json.loads(path.read_text())
    for old in ("0" * 64, {"form": "another", "weights": {}}):
        path.write_text(json.dumps({**state, "frozen": old}))
        with pytest.raises(TrainError, match="was saved by a version whose fingerprints"):
            load_trained(tmp_path / "a")
