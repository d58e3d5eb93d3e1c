"""Print a conversation with the trained tokens marked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console
from rich.style import Style
from rich.text import Text

from lapilli.data.dataset.dataset import Dataset
from lapilli.data.io.printable import one_line
from lapilli.data.text.token_text import Piece, join_pieces, transcript
from pipelines.cli import command

__all__ = ["print_transcript", "read_transcript", "transcript_text"]

TRAINED = Style(color="green", bold=True)
STYLES = {"text": Style(), "special": Style(color="cyan"), "image": Style(color="magenta")}
TOKEN_STYLES = (Style(), Style(underline=True))  # neighbours differ, so that their ends are seen
OPEN, CLOSE = "[[", "]]"


def read_transcript(dataset: Dataset, index: int, *, image_text: str = "") -> list[Piece]:
    """Sample `index` of an opened dataset, with the dataset's own tokenizer.

    An image is shown as `image_text`, or as the tokens the dataset was opened for.
    """
    sample = dataset.sample(index)
    return transcript(
        sample.input_ids,
        sample.label_spans,
        dataset.tokenizer,
        image_text=image_text or f"<image {dataset.image_tokens} tokens>",
    )


def print_transcript(
    pieces: Sequence[Piece], *, tokens: bool = False, console: Console | None = None
) -> None:
    """Print a conversation.

    Args:
        pieces: What `read_transcript` gives.
        tokens: Show where one token ends and the next begins.
        console: Where to; a file or a terminal without colour gets brackets.
    """
    console = console or command.console
    text = transcript_text(pieces, tokens=tokens, colour=has_colour(console))
    if console.is_terminal:
        console.print(text, overflow="fold", highlight=False)
    else:
        console.print(text, soft_wrap=True, highlight=False)


def has_colour(console: Console) -> bool:
    """Whether trained text can be shown by color."""
    return console.color_system is not None and not console.no_color


def transcript_text(pieces: Sequence[Piece], *, tokens: bool = False, colour: bool) -> Text:
    """A conversation as rich text; with `tokens` a bar or an underline parts its tokens."""
    text = Text()
    for trained, run in groupby(pieces, lambda piece: piece.trained):
        if trained and not colour:
            text.append(OPEN)
        _append(text, run, tokens=tokens, colour=colour)
        if trained and not colour:
            text.append(CLOSE)
    return text


def _append(text: Text, run: Iterable[Piece], *, tokens: bool, colour: bool) -> None:
    for number, piece in enumerate(list(run) if tokens else join_pieces(list(run))):
        style = STYLES[piece.kind] + (TRAINED if piece.trained else Style())
        if tokens and colour:
            style += TOKEN_STYLES[number % 2]
        if tokens and not colour and number:
            text.append("|")
        text.append(visible(piece.text), style if colour else None)


def visible(text: str) -> str:
    """Text that cannot steer a terminal, as `one_line` spells it; an arrow marks a line's end."""
    return "↵\n".join(map(one_line, text.split("\n")))
