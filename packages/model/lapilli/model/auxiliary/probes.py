"""Probes: one small resampler a layer that reads a teacher's features off a frozen model's states.

Shape suffix legend: B rows, S tokens, N images, T rows of the tower's an image, R rows of a target,
C width, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lapilli.model.auxiliary.layer_states import decoder_layers, kept_states
from lapilli.model.auxiliary.perceiver import Perceiver
from lapilli.model.auxiliary.predictors import image_positions

__all__ = ["Probe", "build_probes", "image_states"]


class Probe(nn.Module):
    """Predict a target from one layer's states of an image's own rows.

    Predictions start with each number's mean and deviation over some targets, which the output's
    norm would else have to learn first.

    Args:
        size: Of the states, D.
        targets_NRC: Some targets; as many queries are learned as they have rows.
    """

    def __init__(self, size: int, targets_NRC: Tensor) -> None:
        super().__init__()
        rows, width = targets_NRC.shape[1:]
        self.queries = nn.Parameter(torch.randn(1, rows, size))
        self.resampler = Perceiver(size, width, width)
        with torch.no_grad():
            self.resampler.norm_out.weight.copy_(targets_NRC.flatten(0, 1).std(0, correction=0))
            self.resampler.norm_out.bias.copy_(targets_NRC.flatten(0, 1).mean(0))

    def forward(self, states_NTD: Tensor) -> Tensor:
        """[N, R, C] of the image rows' states."""
        rows_N = torch.arange(len(states_NTD), device=states_NTD.device)
        sees_NT = torch.ones(states_NTD.shape[:2], dtype=torch.bool, device=states_NTD.device)
        return self.resampler(states_NTD, self.queries, rows_N, sees_NT)


def build_probes(
    layers: Sequence[int], size: int, targets_NRC: Tensor, *, seed: int
) -> nn.ModuleDict:
    """A probe a layer, by its number; all start from the same weights, which `seed` decides."""
    probes: dict[str, nn.Module] = {}
    with torch.random.fork_rng(devices=[]):
        for layer in layers:
            torch.manual_seed(seed)
            probes[str(layer)] = Probe(size, targets_NRC)
    return nn.ModuleDict(probes)


@torch.no_grad()
def image_states(
    model: Any, inputs: Mapping[str, Tensor], layers: Sequence[int], images: int
) -> dict[int, Tensor]:
    """Layers' states of the rows that the tower gives for each image, fp32 [N, T, D].

    Args:
        model: A `VisionLanguageModel`.
        inputs: A batch of one sample a row: `input_ids`, `position_ids`, `merge_index`, `pixels`.
        layers: Counted from 1; the state of the last is after the decoder's norm.
        images: Of the batch, N, those that pad it left out.
    """
    decoder = model.language.get_decoder()
    embedded_BSD = model.embed(inputs["input_ids"], inputs["merge_index"], inputs["pixels"])
    with kept_states(decoder, layers) as states:
        last_BSD = decoder(
            use_cache=False, inputs_embeds=embedded_BSD, position_ids=inputs["position_ids"]
        ).last_hidden_state
    states[len(decoder_layers(decoder))] = last_BSD
    places_NK = image_positions(inputs["merge_index"], len(inputs["pixels"]), model.image_tokens)
    places_NT = places_NK[:images, : model.vision.num_tokens]
    return {layer: states[layer].flatten(0, 1)[places_NT].float() for layer in layers}
