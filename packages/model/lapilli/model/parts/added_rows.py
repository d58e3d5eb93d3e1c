"""Train the vocabulary rows added by `language.vocab_size` while the tables stay frozen.

What peft calls trainable tokens. Ours read the tables past their modules, so a wrapper around a
module would not be seen; the rows are parameters of their own instead, as small as they are.

Shape suffix legend: B rows of a batch, S tokens, V vocabulary, D hidden size, R added rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ADDED", "AddedRows", "add_rows", "added_rows", "source_rows", "table_names"]

ADDED = "added_rows"  # the child's name below the language model


class AddedRows(nn.Module):
    """The last rows of a frozen embedding and, where it has a table of its own, of a frozen head.

    Attributes:
        first: Token id of the first row.
        embedding: [R, D].
        head: [R, D]; None where the head is tied to the embedding, or its rows stay.
    """

    def __init__(
        self, embedding_VD: Tensor, head_VD: Tensor | None, first: int, *, is_tied: bool
    ) -> None:
        super().__init__()
        self.first, self._is_tied = first, is_tied
        self.embedding = nn.Parameter(embedding_VD[first:].detach().clone())
        self.head = None if head_VD is None else nn.Parameter(head_VD[first:].detach().clone())

    @property
    def head_rows(self) -> nn.Parameter | None:
        """[R, D]: the head's rows, whether or not they are the embedding's; None if they stay."""
        return self.embedding if self._is_tied else self.head

    def embed(self, ids_BS: Tensor, embedded_BSD: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """[B, S, D]: the embedded tokens with those of added ids replaced, times `scale`.

        Every row gets a gradient, of zeros where no added id is among the tokens.
        """
        places_BS = (ids_BS - self.first).clamp(min=0)
        rows_BSD = nn.functional.embedding(places_BS, self.embedding) * scale
        is_added_BS1 = (ids_BS >= self.first).unsqueeze(-1)
        return torch.where(is_added_BS1, rows_BSD.to(embedded_BSD.dtype), embedded_BSD)


def source_rows(language: Any) -> int:
    """Rows of the vocabulary that came with the weights; those behind them were added."""
    return int(getattr(language, "source_rows", language.config.vocab_size))


def added_rows(language: Any) -> AddedRows | None:
    """The added rows that learn by themselves, if there are any."""
    return getattr(language, ADDED, None)


def table_names(language: Any) -> dict[str, str]:
    """What each table is, `embedding` or `head`, by its parameter's name below the language model.

    A tied head's name is there too.
    """
    kinds = {
        id(language.get_output_embeddings()): "head",
        id(language.get_input_embeddings()): "embedding",
    }
    return {
        f"{name}.weight": kinds[id(module)]
        for name, module in language.named_modules()
        if id(module) in kinds
    }


def add_rows(language: Any, *, with_head: bool = True) -> AddedRows | None:
    """Let the rows that were added to the vocabulary learn; nothing where none were.

    The tables' own modules give the same answers as ours do: transformers calls them to generate.

    Args:
        language: The language model.
        with_head: Whether those of an untied head learn too.
    """
    first = source_rows(language)
    if first >= language.config.vocab_size:
        return None
    embedding, head = language.get_input_embeddings(), language.get_output_embeddings()
    is_tied = head.weight is embedding.weight
    own_head = None if is_tied or not with_head else head.weight
    rows = AddedRows(embedding.weight, own_head, first, is_tied=is_tied)
    head_rows: Any = rows.head_rows
    language.add_module(ADDED, rows)

    def embed(module: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
        return rows.embed(given[0], output, getattr(module, "embed_scale", 1.0))

    def project(module: Any, given: tuple[Any, ...], output: Tensor) -> Tensor:
        bias = None if module.bias is None else module.bias[first:]
        new = nn.functional.linear(given[0], head_rows, bias)
        return torch.cat([output[..., :first], new], -1)

    embedding.register_forward_hook(embed)
    if head_rows is not None:
        head.register_forward_hook(project)
    return rows
