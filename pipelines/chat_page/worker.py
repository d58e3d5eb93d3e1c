"""Answer chat requests: prepare images apart, bound prompts, generate one by one.

Work for a client that has gone is ended: a decoder's process is killed, a queued question is
skipped, an answer ends with its next token.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lapilli.data.errors import DataError
from lapilli.data.images.decode_worker import DecodeLimits, DecoderProcess, OverLimit
from lapilli.data.images.view import BadImage
from lapilli.data.record import Reason, TextPart, Turn
from lapilli.model.config import Decoding
from lapilli.model.generate import expanded_length
from lapilli.model.parts.positions import positions_of
from lapilli.train.inference.assistant import Assistant, Question, bad_image
from pipelines.cli.settings import ChatLimits

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Busy", "ChatWorker"]

MIB = 1 << 20
QUICK = DecodeLimits(seconds=1, memory_bytes=200 * MIB)  # a photo of 12 megapixels takes 0.2 s
QUICK_LANES = 2
MOST_SLOW = 4  # images that wait for the lane of what takes longer
LETTERS = 16  # a token; texts of more letters than the positions' are not made into tokens
MOST_LETTERS = 200_000  # for a model without a bound
Piece = str | BaseException | None
Found = TypeVar("Found")


class Busy(Exception):
    """Too many requests at once; the client may retry."""


@dataclass
class _Job:
    question: Question
    pixels: NDArray[np.uint8]
    tell: Callable[[Piece], None]
    is_over: threading.Event


class ChatWorker:
    """Prepares questions side by side and answers them in the order in which they are ready.

    Args:
        assistant: The model.
        decoding: How answers are written.
        limits: What is taken.

    Raises:
        DataError: The process that decodes images does not start.
    """

    def __init__(self, assistant: Assistant, decoding: Decoding, limits: ChatLimits) -> None:
        spec = assistant.spec
        spec = replace(spec, max_pixels=min(spec.max_pixels, limits.pixels))
        self._assistant, self._decoding = replace(assistant, spec=spec), decoding
        self._most = DecodeLimits(limits.decode_seconds, limits.decode_mib * MIB)
        self._decoder = DecoderProcess(spec)
        self._quick = ThreadPoolExecutor(QUICK_LANES, "decode")
        self._slow = ThreadPoolExecutor(1, "decode-slow")
        self._measure = ThreadPoolExecutor(1, "measure")
        self._num_slow = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer_all, name="answers", daemon=True).start()

    async def ask(self, question: Question, prepared: Callable[[], None]) -> AsyncGenerator[str]:
        """Pieces of the answer as they are written; closing the iterator ends the work.

        Args:
            question: What is asked.
            prepared: Called when its images' bytes are not needed any more.

        Raises:
            DataError: An image that cannot be used; names it.
            DataError, ModelError: It is longer than the model's positions.
            Busy: Too many images that take long are waiting.
        """
        loop = asyncio.get_running_loop()
        is_over = threading.Event()
        pieces: asyncio.Queue[Piece] = asyncio.Queue()

        def tell(piece: Piece) -> None:
            if not is_over.is_set():  # the loop may be closed then
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            pixels = await self._pixels(question, is_over)
            question = replace(question, images=())
            prepared()
            self._jobs.put(_Job(question, pixels, tell, is_over))
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            is_over.set()

    def check_length(self, question: Question) -> None:
        """Compare a question with the model's positions; a long text is not read to its end.

        Raises:
            DataError: Too many letters to be looked at.
            ModelError: Too many tokens; gives their number and the positions.
        """
        known = positions_of(self._assistant.model.language)
        most = LETTERS * known.limit if known else MOST_LETTERS
        letters = sum(len(turn.text) for turn in question.turns)
        if letters <= most:
            self._assistant.check([question], self._decoding, strict=True)
            return
        if known is not None:
            text = "".join(turn.text for turn in question.turns)[: most // 2]
            prompt = self._assistant.prompt((Turn("user", (TextPart(text),)),))
            tokens = expanded_length(self._assistant.model, prompt)
            if tokens > known.limit:
                raise DataError(
                    f"too long: more than {tokens} tokens, the language model has {known.limit} "
                    "positions; ask something shorter"
                )
        raise DataError(f"too long: {letters} letters, at most {most}; ask something shorter")

    def close(self) -> None:
        """End all work."""
        self._jobs.put(None)
        for pool in (self._quick, self._slow, self._measure):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    async def _pixels(self, question: Question, is_over: threading.Event) -> NDArray[np.uint8]:
        """The images, uint8 [images, size, size, 3], of a question that is short enough."""
        await _in(self._measure, partial(self.check_length, question))
        size = self._assistant.spec.size
        made = np.zeros((len(question.images), size, size, 3), np.uint8)
        for number, data in enumerate(question.images):
            try:
                made[number] = await self._image(data, is_over)
            except BadImage as error:
                raise bad_image(question.name, number, error) from None
        return made

    async def _image(self, data: bytes, is_over: threading.Event) -> NDArray[np.uint8]:
        """Prepare an image, with a short limit first, so that a slow one does not block others."""
        take = self._decoder.prepare
        try:
            return await _in(self._quick, partial(take, data, QUICK, is_over.is_set))
        except OverLimit:
            pass
        except BadImage as error:  # some decoders say so where memory is short
            if error.reason != Reason.IMAGE_UNDECODABLE:
                raise
        if self._num_slow >= MOST_SLOW:
            raise Busy("too many images that take long to decode; try again later")
        self._num_slow += 1
        try:
            return await _in(self._slow, partial(take, data, self._most, is_over.is_set))
        except OverLimit:
            raise BadImage(
                Reason.IMAGE_TOO_LARGE,
                f"decoding it takes more than {self._most.seconds} s or "
                f"{self._most.memory_bytes // MIB} MiB",
            ) from None
        finally:
            self._num_slow -= 1

    def _answer_all(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.is_over.is_set():
                continue
            try:
                self._assistant.answer(
                    [job.question],
                    self._decoding,
                    on_text=job.tell,
                    pixels=[job.pixels],
                    is_over=job.is_over.is_set,
                )
                job.tell(None)
            except BaseException as error:
                job.tell(error)


async def _in(pool: ThreadPoolExecutor, work: Callable[[], Found]) -> Found:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
