"""The Perceiver block that predicts a target from hidden states: one cross-attention, one MLP.

Shape suffix legend: B rows, S tokens, N images, Q queries, D hidden size, W width of the block,
I inner size (heads x head size), H heads, E size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["HEADS", "HEAD_SIZE", "INNER", "Perceiver", "fit_queries"]

HEADS, HEAD_SIZE = 4, 32
INNER = HEADS * HEAD_SIZE


class _Attention(nn.Module):
    """Queries attend to the states and to themselves."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, INNER, bias=False)
        self.to_kv = nn.Linear(width, 2 * INNER, bias=False)
        self.to_out = nn.Linear(INNER, width, bias=False)

    def forward(
        self, states_BSW: Tensor, queries_NQW: Tensor, rows_N: Tensor, sees_NS: Tensor
    ) -> Tensor:
        normed_NQW = self.norm2(queries_NQW)
        # of a row's states once, whatever its images
        from_states = self.to_kv(self.norm1(states_BSW)).index_select(0, rows_N)
        from_queries = self.to_kv(normed_NQW)
        if len(from_queries) < len(rows_N):  # learned queries: the same ones for every image
            from_queries = from_queries.expand(len(rows_N), -1, -1)
        keys, values = torch.cat([from_states, from_queries], 1).chunk(2, -1)
        scale = HEAD_SIZE**-0.25  # on both sides: smaller numbers than on their product
        scores_NHQK = (_split(self.to_q(normed_NQW)) * scale) @ (_split(keys) * scale).mT
        own_NQ = sees_NS.new_ones(len(rows_N), queries_NQW.shape[1])
        sees_N11K = torch.cat([sees_NS, own_NQ], 1)[:, None, None]
        scores_NHQK = scores_NHQK.float().masked_fill(~sees_N11K, -torch.inf)
        found_NHQE = torch.softmax(scores_NHQK, -1).to(values.dtype) @ _split(values)
        return self.to_out(found_NHQE.transpose(1, 2).flatten(2))


def _split(rows_NKI: Tensor) -> Tensor:
    """[N, H, K, E]."""
    return rows_NKI.unflatten(-1, (HEADS, HEAD_SIZE)).transpose(1, 2)


class Perceiver(nn.Module):
    """Predict [N, Q, outputs] from a layer's states and queries.

    Args:
        inputs: Size of states and queries, D.
        width: Size that the block computes in, W.
        outputs: Size of a predicted row.
    """

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(inputs, width)
        mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width, bias=False),
            nn.GELU(),
            nn.Linear(width, width, bias=False),
        )
        self.layers = nn.ModuleList([nn.ModuleList([_Attention(width), mlp])])
        self.proj_out = nn.Linear(width, outputs)
        self.norm_out = nn.LayerNorm(outputs)

    def forward(
        self, states_BSD: Tensor, queries_NQD: Tensor, rows_N: Tensor, sees_NS: Tensor
    ) -> Tensor:
        """Predict each image's rows.

        Args:
            states_BSD: A layer's states.
            queries_NQD: The queries of each image; [1, Q, D] if they are the same for all.
            rows_N: int64, the row each image stands in.
            sees_NS: bool, the positions of that row which count as keys.
        """
        states_BSW, queries_NQW = self.proj_in(states_BSD), self.proj_in(queries_NQD)
        for layer in self.layers:
            attention, mlp = layer.children()
            queries_NQW = attention(states_BSW, queries_NQW, rows_N, sees_NS) + queries_NQW
            queries_NQW = mlp(queries_NQW) + queries_NQW
        return self.norm_out(self.proj_out(queries_NQW))


def fit_queries(states_NQD: Tensor, count: int) -> Tensor:
    """States as `count` queries: themselves, repeated whole, or their mean repeated.

    Args:
        states_NQD: Some states.
        count: How many queries there are to be.
    """
    given = states_NQD.shape[1]
    if given == count:
        return states_NQD
    if count > 1 and count % given == 0:
        return states_NQD.repeat(1, count // given, 1)
    return states_NQD.mean(1, keepdim=True).expand(-1, count, -1)
