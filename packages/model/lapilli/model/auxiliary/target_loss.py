"""Smooth L1 and InfoNCE of predictions against the targets of a whole global batch.

No term depends on how the global batch is cut into micro-batches: an image's negatives are all
images of the global batch, and sums are divided by counts of the global batch.

Shape suffix legend: N images of the micro-batch, M images of the global batch, R rows of a target,
C width, X = R x C.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["AuxInputs", "TargetRows", "fit_rows", "image_losses", "inverse_norms"]

AT_ONCE = 16  # targets that are fp32 at the same time
MOST_SCALE = 100.0


@dataclass(frozen=True)
class TargetRows:
    """One task's targets of a global batch, as they are stored.

    Attributes:
        values: int8, or floats, [M, R, C].
        scales: fp32 [M, R]: a row is its values times its scale.
        valid: bool [M]; an image without a target is in no mean, and no one's negative.
    """

    values: Tensor
    scales: Tensor
    valid: Tensor

    def rows(self, indices: Tensor) -> Tensor:
        """The targets of some images, fp32 [len(indices), R, C]."""
        values = self.values.index_select(0, indices).float()
        return values * self.scales.index_select(0, indices).unsqueeze(-1)


@dataclass(frozen=True)
class AuxInputs:
    """What the losses of a micro-batch need beside its batch.

    Attributes:
        targets: By task, the targets of the global batch.
        own: int64 [N], where in those each image of the micro-batch is; -1 for a blank one.
        segments: int32 [B, S], the tree each token belongs to; 0 for padding.
        records: Records of the global batch.
        weight: Multiplies the loss: what a sum over tokens is divided by later.
        losses: fp32 [predictors, 2], filled with each predictor's share of the mean smooth L1 and
            InfoNCE of the global batch, unweighted and detached.
    """

    targets: Mapping[str, TargetRows]
    own: Tensor
    segments: Tensor
    records: int
    weight: float
    losses: Tensor

    def tensors(self) -> Iterator[Tensor]:
        """All of them."""
        yield from (self.own, self.segments, self.losses)
        for rows in self.targets.values():
            yield from (rows.values, rows.scales, rows.valid)


def image_losses(
    predicted_NRC: Tensor, targets: TargetRows, norms_M: Tensor, own_N: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean smooth L1 and InfoNCE of each image, fp32 [N] each.

    Args:
        predicted_NRC: The predictions.
        targets: The targets of the global batch.
        norms_M: `inverse_norms` of them.
        own_N: int64, each image's own target; any place for an image without one.
        scale: Logarithm of what similarities are multiplied by, a scalar.
    """
    predicted_NRC = fit_rows(predicted_NRC.float(), targets.values.shape[1])
    own_NRC = targets.rows(own_N)
    smooth_N = torch.nn.functional.smooth_l1_loss(predicted_NRC, own_NRC, reduction="none")
    smooth_N = smooth_N.flatten(1).mean(1)
    unit_NX = torch.nn.functional.normalize(predicted_NRC.flatten(1), dim=1)
    products_NM = _Products.apply(unit_NX, targets.values, targets.scales)
    assert isinstance(products_NM, Tensor)
    similar_NM = products_NM * norms_M * scale.float().exp().clamp(max=MOST_SCALE)
    is_own_NM = torch.arange(len(norms_M), device=own_N.device) == own_N.unsqueeze(1)
    counts_NM = is_own_NM | targets.valid  # never none, whatever is missing
    similar_NM = similar_NM.masked_fill(~counts_NM, -torch.inf)
    at_own_N = similar_NM.gather(1, own_N.unsqueeze(1)).squeeze(1)
    return smooth_N, similar_NM.logsumexp(1) - at_own_N


@torch.no_grad()
def inverse_norms(targets: TargetRows) -> Tensor:
    """One over the length of each target as one vector, fp32 [M]."""
    # of integers first: a target of a million values takes no fp32 copy of all
    squares = [
        (targets.values[start : start + AT_ONCE].float().square().sum(-1)).double()
        for start in range(0, len(targets.values), AT_ONCE)
    ]
    squares_M = (torch.cat(squares) * targets.scales.double().square()).sum(-1)
    return squares_M.sqrt().clamp(min=1e-12).reciprocal().float()


def fit_rows(predicted_NRC: Tensor, rows: int) -> Tensor:
    """Predictions as many rows as the targets have: of a square grid, means of square blocks."""
    given = predicted_NRC.shape[1]
    if given == rows:
        return predicted_NRC
    side, wanted = round(given**0.5), round(rows**0.5)
    block = side // wanted
    if (side * side, wanted * wanted, wanted * block) != (given, rows, side):
        raise ValueError(f"{given} predicted rows do not make {rows} by square blocks")
    return predicted_NRC.unflatten(1, (wanted, block, wanted, block)).mean((2, 4)).flatten(1, 2)


class _Products(torch.autograd.Function):
    """[N, X] times the targets, transposed: [N, M]. Keeps them as they are stored for backward."""

    @staticmethod
    def forward(ctx: Any, unit_NX: Tensor, values_MRC: Tensor, scales_MR: Tensor) -> Tensor:
        ctx.save_for_backward(values_MRC, scales_MR)
        parts = [unit_NX @ rows.T for rows in _fp32(values_MRC, scales_MR)]
        return torch.cat(parts, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient_NM,) = gradients
        parts = gradient_NM.split(AT_ONCE, 1)
        found = [part @ rows for part, rows in zip(parts, _fp32(*ctx.saved_tensors), strict=True)]
        return torch.stack(found).sum(0), None, None


def _fp32(values_MRC: Tensor, scales_MR: Tensor) -> Any:
    """A few targets at a time, fp32 [some, X]."""
    for start in range(0, len(values_MRC), AT_ONCE):
        here = slice(start, start + AT_ONCE)
        yield (values_MRC[here].float() * scales_MR[here].unsqueeze(-1)).flatten(1)
