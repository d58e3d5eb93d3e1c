"""Task tokens, predictors and embedding losses, against short loops over single images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lapilli.data.batches.collate import Batch, BatchShape, collate
from lapilli.model.auxiliary.perceiver import HEAD_SIZE, HEADS, fit_queries
from lapilli.model.auxiliary.target_loss import (
    AuxInputs,
    TargetRows,
    fit_rows,
    image_losses,
    inverse_norms,
)
from lapilli.model.config import AuxConfig, Decoding, LoraConfig
from lapilli.model.errors import ModelError
from lapilli.model.generate import generate
from lapilli.model.parts.recomputation import recompute_all
from lapilli.model.parts.trainable import set_modes, trainable_parameters
from lapilli.model.vlm import VisionLanguageModel, build_model
from tests.model import twins
from tests.model.aux_models import AUX, EACH, ROWS, aux_batch, aux_config, aux_inputs, made_targets


def reference_block(block: Any, keys: Tensor, queries: Tensor) -> Tensor:
    """[Q, outputs] of one image, from the block's formula; `keys` [K, D] are those it sees."""
    functional = torch.nn.functional
    attention, mlp = block.layers[0]
    keys, latents = block.proj_in(keys), block.proj_in(queries)
    both = torch.cat([attention.norm1(keys), attention.norm2(latents)])
    found = []
    for head in range(HEADS):
        here = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        inner = HEADS * HEAD_SIZE
        q = attention.norm2(latents) @ attention.to_q.weight[here].T
        k = both @ attention.to_kv.weight[:inner][here].T
        v = both @ attention.to_kv.weight[inner:][here].T
        found.append(torch.softmax(q @ k.T / HEAD_SIZE**0.5, -1) @ v)
    latents = torch.cat(found, -1) @ attention.to_out.weight.T + latents
    normed = functional.layer_norm(latents, latents.shape[-1:], mlp[0].weight, mlp[0].bias)
    latents = functional.gelu(normed @ mlp[1].weight.T) @ mlp[3].weight.T + latents
    return block.norm_out(block.proj_out(latents))


def layers_of(model: VisionLanguageModel, row: Tensor) -> dict[int, Tensor]:
    """The states [S, D] after each layer of one row without padding, from transformers itself."""
    decoder = model.language.get_decoder()
    states = decoder(inputs_embeds=row[None], output_hidden_states=True).hidden_states
    return {number: state[0] for number, state in enumerate(states) if number}


def reference_loss(
    model: VisionLanguageModel, batch: Batch, targets: Mapping[str, TargetRows], over: int
) -> Tensor:
    """The sum over predictors for the images of a batch, the first ones of the global batch."""
    parts: Any = model
    aux, image, total = model.config.aux, 0, torch.zeros(())
    embedded = model.embed(
        *(torch.from_numpy(x) for x in (batch.input_ids, batch.merge_index, batch.pixels))
    )
    for row in range(len(batch.sample_ids)):
        length = int(batch.row_lengths[row])
        states = layers_of(model, embedded[row, :length])
        slots = batch.merge_index[row, :length]
        for number in sorted({int(slot) // EACH for slot in slots if slot >= 0}):
            for task, layer in aux.heads:
                first = ROWS + aux.num_task_tokens * aux.tasks.index(task)
                own = [number * EACH + first + k for k in range(aux.num_task_tokens)]
                seen = [
                    place for place, slot in enumerate(slots)
                    if slot < 0 or slot % EACH < ROWS or int(slot) in own
                ]  # fmt: skip
                queries = parts.task_tokens.get_parameter(f"special_{task}_tokens")
                if task == "gen":
                    places = [int(np.flatnonzero(slots == slot)[0]) for slot in own]
                    queries = states[layer][places].mean(0, keepdim=True)
                heads = parts.predictors.get_submodule(f"image_{task}_heads")
                head = heads[aux.layers[task].index(layer)]
                said = reference_block(head.projector, states[layer][seen], queries)
                if task == "depth":
                    said = head.linear_1(said)
                scale = parts.predictors.get_parameter(f"{task}_logit_scale").exp().clamp(max=100)
                wanted = [
                    value.float() * size[:, None]
                    for value, size in zip(targets[task].values, targets[task].scales, strict=True)
                ]
                is_valid = targets[task].valid.tolist()
                if not is_valid[image]:
                    continue
                smooth = torch.nn.functional.smooth_l1_loss(said, wanted[image])
                similar = [
                    scale * torch.nn.functional.cosine_similarity(said.flatten(), one.flatten(), 0)
                    for one, there in zip(wanted, is_valid, strict=True) if there
                ]  # fmt: skip
                place = sum(is_valid[:image])
                info = torch.cat(similar).logsumexp(0) - similar[place]
                total = total + aux.weight(task) * (smooth + 0.3 * info).sum() / over
            image += 1
    return total


def both_losses(model: VisionLanguageModel, batch: Batch, aux: AuxInputs) -> tuple[Tensor, Tensor]:
    """Our whole loss, and that of the text alone."""
    return model(**twins.inputs(batch), aux=aux), model(**twins.inputs(batch))


@pytest.mark.parametrize("mean_over", ["images", "records"])
def test_loss_and_every_gradient_are_those_of_a_loop_over_images(mean_over: Any) -> None:
    model = build_model(aux_config(replace(AUX, mean_over=mean_over)))
    batch = aux_batch((1, 2, 0))
    aux = aux_inputs(batch, 0, 6)
    over = 5  # of 6 images one has no target; and 5 records
    expected = 7.0 * reference_loss(model, batch, aux.targets, over)
    found, text = both_losses(model, batch, aux)
    torch.testing.assert_close(found - text, expected, rtol=1e-5, atol=1e-5)
    wanted = list(trainable_parameters(model).values())
    ours = torch.autograd.grad(found - text, wanted, allow_unused=True, materialize_grads=True)
    theirs = torch.autograd.grad(expected, wanted, allow_unused=True, materialize_grads=True)
    for name, one, other in zip(trainable_parameters(model), ours, theirs, strict=True):
        torch.testing.assert_close(
            one, other, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n} {m}"
        )
        if name.startswith(("predictors", "task_tokens")):
            assert one.abs().max() > 0, name


def test_the_micro_batches_of_a_global_batch_add_up() -> None:
    model = build_model(aux_config())
    every = twins.samples(3, (1, 0, 2, 1))
    shape = BatchShape(4, (80,), EACH, 4)
    whole = collate(every, shape, twins.SIDE)
    found, text = both_losses(model, whole, aux_inputs(whole, 0, 4))
    parts, first, losses = torch.zeros(()), 0, torch.zeros(4, 2)
    for sample in every:
        batch = collate([sample], replace(shape, rows=1), twins.SIDE)
        aux = aux_inputs(batch, first, 4)
        one, alone = both_losses(model, batch, aux)
        parts, first, losses = parts + one - alone, first + len(sample.pixels), losses + aux.losses
    torch.testing.assert_close(parts, found - text, rtol=1e-5, atol=1e-5)
    weights = torch.tensor([[AUX.weight(task), 0.3 * AUX.weight(task)] for task, _ in AUX.heads])
    torch.testing.assert_close(7 * (weights * losses).sum(), found - text, rtol=1e-5, atol=1e-5)


def test_tokens_stand_behind_each_images_rows_in_the_order_of_the_mode() -> None:
    model = build_model(aux_config())
    parts: Any = model
    batch = aux_batch((2,))
    embedded = model.embed(
        *(torch.from_numpy(x) for x in (batch.input_ids, batch.merge_index, batch.pixels))
    )
    depth = parts.task_tokens.special_depth_tokens
    averaged = [depth[4 * group : 4 * group + 4].mean(0) for group in range(4)]
    gen = [*parts.task_tokens.special_gen_tokens]
    places = np.flatnonzero(batch.merge_index[0] >= 0)
    assert batch.position_ids[0].tolist() == list(range(80))
    assert model.image_tokens == EACH
    for image in range(2):
        own = places[image * EACH : (image + 1) * EACH]
        assert own.tolist() == list(range(own[0], own[0] + EACH))
        torch.testing.assert_close(embedded[0, own[ROWS : ROWS + 4]], torch.stack(gen))
        torch.testing.assert_close(embedded[0, own[ROWS + 4 : ROWS + 8]], torch.stack(averaged))
    assert not (batch.targets[batch.targets >= 0] == 0).any()  # no slot of an image is trained


def test_recomputed_layers_give_the_same_loss_and_gradients() -> None:
    batch, found = aux_batch((1, 1)), []
    for again in (False, True):
        model = build_model(aux_config())
        if again:
            recompute_all(model)
        set_modes(model)
        loss, _ = both_losses(model, batch, aux_inputs(batch, 1, 4))
        loss.backward()
        found.append((loss.detach(), [p.grad for p in trainable_parameters(model).values()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_text_alone_runs_every_part_that_learns_and_adds_nothing() -> None:
    model = build_model(aux_config())
    batch = collate(twins.samples(3, (0, 0)), BatchShape(2, (24,), EACH, 4), twins.SIDE)
    loss, text = both_losses(model, batch, aux_inputs(batch, 0, 3))
    assert loss == text
    loss.backward()
    for name, parameter in trainable_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_an_answer_is_the_argmax_of_the_whole_sequence() -> None:
    model = build_model(aux_config())
    prompt = np.array([5, -200, 7, 9], np.int64)
    pixels = twins.samples(7, (1,))[0].pixels
    (answer,) = generate(model, [prompt], [pixels], Decoding(5))
    ids = prompt
    for expected in answer:
        slots = np.repeat(ids, np.where(ids < 0, EACH, 1))
        index = np.where(slots < 0, np.cumsum(slots < 0) - 1, -1).astype(np.int32)
        text = np.where(slots < 0, 0, slots)
        embedded = model.embed(*(torch.from_numpy(x) for x in (text[None], index[None], pixels)))
        logits = model.language(inputs_embeds=embedded).logits[0, -1]
        assert int(logits.argmax()) == expected
        ids = np.append(ids, expected)


def test_parts_are_there_and_learn_as_the_settings_say() -> None:
    off = {name for name, _ in build_model(twins.config()).named_children()}
    assert not off & {"task_tokens", "predictors"}
    tokens = AuxConfig(mode="gen", num_task_tokens=2, shapes={"gen": (1, 10)})
    frozen = build_model(twins.config(aux=tokens, trainable=("projector",)))
    assert "predictors" not in dict(frozen.named_children())
    learning = {name.partition(".")[0] for name in trainable_parameters(frozen)}
    assert learning == {"projector"}
    lora = build_model(aux_config(lora=LoraConfig(rank=2)))
    names = [*trainable_parameters(lora)]
    assert any(name.startswith("predictors.image_seg_heads.0.projector.proj_in") for name in names)
    assert not any("lora" in name for name in names if name.startswith("predictors"))


def test_pooled_targets_meet_the_means_of_square_blocks() -> None:
    predicted = torch.randn(2, 16, 3)
    grid = predicted.view(2, 4, 4, 3)
    blocks = torch.stack(
        [grid[:, y : y + 2, x : x + 2].mean((1, 2)) for y in (0, 2) for x in (0, 2)], 1
    )
    torch.testing.assert_close(fit_rows(predicted, 4), blocks)
    with pytest.raises(ValueError, match="16 predicted rows"):
        fit_rows(predicted, 9)


def test_many_targets_are_worked_on_a_few_at_a_time_without_a_difference() -> None:
    targets = made_targets(37)["seg"]
    predicted = torch.randn(3, 16, 12, requires_grad=True)
    own, scale = torch.tensor([0, 17, 36]), torch.tensor(2.0)
    smooth, info = image_losses(predicted, targets, inverse_norms(targets), own, scale)
    stored = targets.rows(torch.arange(37))
    similar = torch.nn.functional.cosine_similarity(
        predicted.flatten(1)[:, None], stored.flatten(1)[None], dim=-1
    ) * scale.exp().clamp(max=100)
    kept = similar[:, targets.valid]
    places = torch.cumsum(targets.valid, 0)[own] - 1
    expected = torch.nn.functional.cross_entropy(kept, places, reduction="none")
    torch.testing.assert_close(info, expected, rtol=1e-5, atol=1e-5)
    (ours,) = torch.autograd.grad((smooth + info).sum(), predicted)
    error = torch.nn.functional.smooth_l1_loss(predicted, stored[own], reduction="none")
    (theirs,) = torch.autograd.grad(expected.sum() + error.mean((1, 2)).sum(), predicted)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("given", "count"), [(4, 4), (4, 8), (4, 1), (3, 4)])
def test_states_become_as_many_queries_as_there_are_rows(given: int, count: int) -> None:
    states = torch.randn(2, given, 5)
    found = fit_queries(states, count)
    mean = [states.mean(1)] * count
    expected = [states[:, n % given] for n in range(count)] if count % given == 0 else mean
    torch.testing.assert_close(found, torch.stack(expected, 1))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mode": "gen-gen"}, "aux.mode: 'gen-gen'; expected tasks joined"),
        ({"mode": "pose"}, "aux.shapes: none for task 'pose'"),
        ({"mode": "gen", "layers": {"seg": (1,)}}, "aux.layers: 'seg' is no task of mode 'gen'"),
        ({"mode": "gen", "layers": {"gen": (0,)}}, r"aux.layers.gen: \[0\]"),
        ({"mode": "seg", "shapes": {"seg": (9, 4)}}, r"aux.shapes.seg: \[9, 4\]"),
        ({"mode": "gen", "contrastive_weight": -1.0}, "contrastive_weight -1.0"),
    ],
)
def test_settings_that_make_no_sense_are_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        AuxConfig(**values)


def test_parts_that_are_not_there_cannot_learn_nor_predict() -> None:
    with pytest.raises(ModelError, match=r"trainable: predictors without aux.layers"):
        twins.config(trainable=("predictors",))
    with pytest.raises(ModelError, match="the language model has 2 layers"):
        build_model(aux_config(replace(AUX, layers={"gen": (3,)})))
    with pytest.raises(ModelError, match=r"compile: blocks with aux\.layers"):
        aux_config(compile="blocks")
