"""Task tokens: learned rows that stand behind every image's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapilli.model.config import AuxConfig

__all__ = ["TaskTokens", "tokens_name"]


def tokens_name(task: str) -> str:
    """The parameter of a task's tokens."""
    return "special_TASK_tokens".replace("TASK", task)


class TaskTokens(nn.Module):
    """The tokens of all tasks.

    A task whose target has several rows learns a vector a row: they are its predictors' queries,
    and in the sequence they stand averaged, in as many groups as there are tokens. A task of one
    row learns its tokens themselves. Parameters have VisPer-LM's names.

    Args:
        config: The tasks and their tokens.
        size: The language model's hidden size, D.
    """

    def __init__(self, config: AuxConfig, size: int) -> None:
        super().__init__()
        self._config = config
        for task in config.tasks:
            rows, _ = config.shape(task)
            learned = torch.randn(rows if rows > 1 else config.num_task_tokens, size)
            self.register_parameter(tokens_name(task), nn.Parameter(learned))

    def forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        """What stands in the sequence, [K, D], and by task of several rows its queries, [1, R, D].

        Copies: under ZeRO-3 a parameter is whole only while its module runs.
        """
        tokens: list[Tensor] = []
        queries: dict[str, Tensor] = {}
        count = self._config.num_task_tokens
        for task in self._config.tasks:
            learned_RD = self.get_parameter(tokens_name(task))
            if self._config.shape(task)[0] > 1:
                queries[task] = learned_RD.unsqueeze(0).clone()
            tokens.append(learned_RD.unflatten(0, (count, -1)).mean(1))
        return torch.cat(tokens), queries
