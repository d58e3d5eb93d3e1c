"""Predictors: what each layer's states say of a teacher's features, and how far off it is.

Shape suffix legend: B rows, S tokens, N images, K task tokens an image (k of one task), D hidden
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapilli.model.auxiliary.perceiver import Perceiver, fit_queries
from lapilli.model.auxiliary.target_loss import AuxInputs, image_losses, inverse_norms
from lapilli.model.config import AuxConfig

__all__ = [
    "ImagePlaces",
    "Predictors",
    "heads_name",
    "image_places",
    "image_positions",
    "scale_name",
]

FIRST_LOGIT_SCALE = 2.0
WITH_MLP = "depth"


@dataclass(frozen=True)
class ImagePlaces:
    """Where in a batch its images and their task tokens stand.

    Attributes:
        rows: int64 [N], each image's row.
        tokens: int64 [N, K], flattened positions of its task tokens.
        sees: By task, bool [N, S]: what its predictors see of that row: all tokens of the image's
            own segment but other task tokens.
    """

    rows: Tensor
    tokens: Tensor
    sees: dict[str, Tensor]


def image_places(
    merge_index_BS: Tensor, segments_BS: Tensor, images: int, rows: int, config: AuxConfig
) -> ImagePlaces:
    """Find a batch's images from its merge index; nothing is read by the host.

    Args:
        merge_index_BS: The feature row of each slot.
        segments_BS: The tree each token belongs to, 0 for padding.
        images: Images of the batch, N; one that stands nowhere gets any place.
        rows: Feature rows of an image without its task tokens.
        config: The tasks.
    """
    each = rows + config.tokens
    places_NT = image_positions(merge_index_BS, images, each)
    first_N = places_NT[:, 0]
    rows_N = first_N // merge_index_BS.shape[1]
    image_NS = (merge_index_BS // each).index_select(0, rows_N)
    offset_NS = (merge_index_BS % each - rows).index_select(0, rows_N)
    is_token_NS = (merge_index_BS.index_select(0, rows_N) >= 0) & (offset_NS >= 0)
    own_segment_N1 = segments_BS.flatten().index_select(0, first_N).unsqueeze(1)
    near_NS = segments_BS.index_select(0, rows_N) == own_segment_N1
    is_own_NS = image_NS == torch.arange(images, device=image_NS.device).unsqueeze(1)
    sees = {
        task: near_NS
        & (~is_token_NS | (is_own_NS & (offset_NS // config.num_task_tokens == number)))
        for number, task in enumerate(config.tasks)
    }
    return ImagePlaces(rows_N, places_NT[:, rows:], sees)


def image_positions(merge_index_BS: Tensor, images: int, each: int) -> Tensor:
    """Where in a batch's flattened positions each image's rows stand, int64 [images, each].

    Args:
        merge_index_BS: The feature row of each slot, -1 for text.
        images: Images of the batch; one that stands nowhere gets any place.
        each: Rows of an image, its task tokens among them.
    """
    flat = merge_index_BS.flatten().long()
    # text goes to a scratch place behind the features, so that no shape depends on the data
    scratch = torch.where(flat >= 0, flat, images * each)
    places = flat.new_zeros(images * each + 1)
    places.index_copy_(0, scratch, torch.arange(len(flat), device=flat.device))
    return places[:-1].unflatten(0, (images, each))


def heads_name(task: str) -> str:
    """The module of a task's predictors, one a layer."""
    return "image_TASK_heads".replace("TASK", task)


def scale_name(task: str) -> str:
    """The parameter of what a task's similarities are multiplied by."""
    return "TASK_logit_scale".replace("TASK", task)


class _Head(nn.Module):
    """The predictor of one task at one layer.

    VisPer-LM's for depth has an MLP for each of three levels, of which its loss takes the first.
    """

    def __init__(self, task: str, size: int, width: int) -> None:
        super().__init__()
        self.projector = Perceiver(size, size if task == WITH_MLP else width, width)
        self.linear_1 = (
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            if task == WITH_MLP
            else nn.Identity()
        )

    def forward(self, *given: Tensor) -> Tensor:
        return self.linear_1(self.projector(*given))


class Predictors(nn.Module):
    """A predictor for every task and layer. Parameters have VisPer-LM's names.

    Args:
        config: Tasks, layers and weights.
        size: The language model's hidden size, D.
    """

    def __init__(self, config: AuxConfig, size: int) -> None:
        super().__init__()
        self._config = config
        for task in {task: None for task, _ in config.heads}:
            _, width = config.shape(task)
            heads = [_Head(task, size, width) for _ in config.layers[task]]
            self.add_module(heads_name(task), nn.ModuleList(heads))
            scale = nn.Parameter(torch.full((1,), FIRST_LOGIT_SCALE))
            self.register_parameter(scale_name(task), scale)

    def predict(
        self,
        states: Mapping[int, Tensor],
        learned: Mapping[str, Tensor],
        places: ImagePlaces,
    ) -> dict[tuple[str, int], Tensor]:
        """What each predictor says of each image, [N, R, C], by task and layer.

        Args:
            states: By layer, [B, S, D].
            learned: By task, the queries that its tokens are.
            places: Where the images stand.
        """
        found: dict[tuple[str, int], Tensor] = {}
        for task, layer in self._config.heads:
            queries = learned.get(task)
            if queries is None:
                queries = self._token_states(task, states[layer], places)
            number = self._config.layers[task].index(layer)
            head = self.get_submodule(f"{heads_name(task)}.{number}")
            found[task, layer] = head(states[layer], queries, places.rows, places.sees[task])
        return found

    def _token_states(self, task: str, states_BSD: Tensor, places: ImagePlaces) -> Tensor:
        """A layer's states of a task's tokens, as many as its target has rows: [N, R, D]."""
        count, number = self._config.num_task_tokens, self._config.tasks.index(task)
        places_Nk = places.tokens[:, number * count : (number + 1) * count]
        states_NkD = states_BSD.flatten(0, 1)[places_Nk]
        return fit_queries(states_NkD, self._config.shape(task)[0])

    def forward(
        self,
        states: Mapping[int, Tensor],
        learned: Mapping[str, Tensor],
        places: ImagePlaces,
        given: AuxInputs,
    ) -> Tensor:
        """The micro-batch's share of the global batch's loss, times `given.weight`; a scalar.

        Arguments as for `predict`.
        """
        total = given.losses.new_zeros(())
        has_own_N = given.own >= 0
        own_N = given.own.clamp(min=0)
        norms = {task: inverse_norms(rows) for task, rows in given.targets.items()}
        for number, ((task, _), predicted_NRC) in enumerate(
            self.predict(states, learned, places).items()
        ):
            targets = given.targets[task]
            scale = self.get_parameter(scale_name(task)).squeeze(0)
            smooth_N, info_N = image_losses(predicted_NRC, targets, norms[task], own_N, scale)
            share_N = (has_own_N & targets.valid.index_select(0, own_N)).float()
            if self._config.mean_over == "images":
                share_N = share_N / targets.valid.sum().clamp(min=1)
            else:
                share_N = share_N / max(1, given.records)
            smooth, info = (smooth_N * share_N).sum(), (info_N * share_N).sum()
            given.losses[number].copy_(torch.stack([smooth, info]).detach())
            weight = self._config.weight(task)
            total = total + weight * (smooth + self._config.contrastive_weight * info)
        return total * given.weight
