"""Answer requests: prepare images apart, bound prompts, continue several answers side by side.

Work for a client that has gone is ended: a decoder's process is killed, a queued question is
skipped, an answer ends with its next token.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from lapilli.data.errors import DataError
from lapilli.data.images.decode_worker import DecodeLimits, DecoderProcess, OverLimit
from lapilli.data.images.view import BadImage
from lapilli.data.record import Reason, TextPart, Turn
from lapilli.model.continuous import ContinuousBatch, NewToken
from lapilli.model.generate import check_positions, expanded_length
from lapilli.model.parts.positions import positions_of
from lapilli.train.inference.assistant import Assistant, Question, bad_image
from pipelines.cli.settings import ServeLimits
from pipelines.serving.completion_request import MIB, CompletionRequest
from pipelines.serving.rows import Answered, AnswerPiece, AnswerRow, Told

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Busy", "ServeWorker"]

QUICK = DecodeLimits(seconds=1, memory_bytes=200 * MIB)  # a photo of 12 megapixels takes 0.2 s
QUICK_LANES = 2
MOST_SLOW = 4  # images that wait for the lane of what takes longer
LETTERS = 16  # a token; texts of more letters than the positions' are not made into tokens
MOST_LETTERS = 200_000  # for a model without a bound
Found = TypeVar("Found")


class Busy(Exception):
    """Too many requests at once; the client may retry."""


class ServeWorker:
    """Prepares questions side by side and answers them in the order in which they are ready.

    Args:
        assistant: The model.
        limits: What is taken.
        batch: Answers that are written at once.

    Raises:
        DataError: The process that decodes images does not start.
    """

    def __init__(self, assistant: Assistant, limits: ServeLimits, batch: int) -> None:
        spec = assistant.spec
        spec = replace(spec, max_pixels=min(spec.max_pixels, limits.pixels))
        self._assistant, self._batch = replace(assistant, spec=spec), batch
        self._most = DecodeLimits(limits.decode_seconds, limits.decode_mib * MIB)
        self._decoder = DecoderProcess(spec)
        self._quick = ThreadPoolExecutor(QUICK_LANES, "decode")
        self._slow = ThreadPoolExecutor(1, "decode-slow")
        self._measure = ThreadPoolExecutor(1, "measure")
        self._num_slow = 0
        self._ready: queue.SimpleQueue[AnswerRow | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer_all, name="answers", daemon=True).start()

    async def ask(
        self, request: CompletionRequest, prepared: Callable[[], None]
    ) -> AsyncGenerator[AnswerPiece | Answered]:
        """Pieces of the answer as they are written; closing the iterator ends the work.

        Args:
            request: What is asked.
            prepared: Called when its images' bytes are not needed any more.

        Raises:
            DataError: An image that cannot be used; names it.
            DataError, ModelError: It is longer than the model's positions.
            Busy: Too many images that take long are waiting.
        """
        loop = asyncio.get_running_loop()
        is_over = threading.Event()
        pieces: asyncio.Queue[Told] = asyncio.Queue()

        def tell(piece: Told) -> None:
            if not is_over.is_set():  # the loop may be closed then
                loop.call_soon_threadsafe(pieces.put_nowait, piece)

        try:
            prompt = await _in(self._measure, partial(self.measure, request))
            pixels = await self._pixels(request.question, is_over)
            request = replace(request, question=replace(request.question, images=()))
            prepared()
            row = AnswerRow(
                assistant=self._assistant, request=request, prompt=prompt,
                prompt_tokens=expanded_length(self._assistant.model, prompt), pixels=pixels,
                tell=tell, is_over=is_over,
            )  # fmt: skip
            self._ready.put(row)
            while True:
                piece = await pieces.get()
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
                if isinstance(piece, Answered):
                    return
        finally:
            is_over.set()

    def measure(self, request: CompletionRequest) -> NDArray[np.int64]:
        """A question's ids, if the model has positions for them; a long text is not read on.

        Raises:
            DataError: Too many letters to be looked at.
            ModelError: Too many tokens; gives their number and the positions.
        """
        question, model = request.question, self._assistant.model
        known = positions_of(model.language)
        most = LETTERS * known.limit if known else MOST_LETTERS
        letters = sum(len(turn.text) for turn in question.turns)
        if letters <= most:
            prompt = self._assistant.prompt(question.turns)
            lengths = [(question.name, expanded_length(model, prompt))]
            check_positions(model, lengths, request.decoding, strict=True)
            return prompt
        if known is not None:
            text = "".join(turn.text for turn in question.turns)[: most // 2]
            prompt = self._assistant.prompt((Turn("user", (TextPart(text),)),))
            tokens = expanded_length(model, prompt)
            if tokens > known.limit:
                raise DataError(
                    f"too long: more than {tokens} tokens, the language model has {known.limit} "
                    "positions; ask something shorter"
                )
        raise DataError(f"too long: {letters} letters, at most {most}; ask something shorter")

    def close(self) -> None:
        """End all work."""
        self._ready.put(None)
        for pool in (self._quick, self._slow, self._measure):
            pool.shutdown(wait=False, cancel_futures=True)
        self._decoder.close()

    async def _pixels(self, question: Question, is_over: threading.Event) -> NDArray[np.uint8]:
        """The images, uint8 [images, size, size, 3]."""
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
        """Continue all answers by a token in turn; questions join between two tokens."""
        batch = ContinuousBatch(self._assistant.model)
        rows: dict[int, AnswerRow] = {}
        while True:
            try:
                while len(rows) < self._batch and batch.has_room:
                    row = self._ready.get(block=not rows)
                    if row is None:
                        return
                    if not row.is_over.is_set():
                        self._join(batch, rows, row)
            except queue.Empty:
                pass
            try:
                tokens = batch.step()
            except BaseException as error:  # memory, or the device: the answers are lost
                for row in rows.values():
                    row.tell(error)
                rows.clear()
                batch = ContinuousBatch(self._assistant.model)
                continue
            for token in tokens:
                self._take(batch, rows, token)

    def _join(self, batch: ContinuousBatch, rows: dict[int, AnswerRow], row: AnswerRow) -> None:
        wants = row.request.top_logprobs is not None
        try:
            token = batch.add(row.prompt, row.pixels, row.request.decoding, wants_logprobs=wants)
        except BaseException as error:
            row.tell(error)
            return
        rows[token.row] = row
        self._take(batch, rows, token)

    def _take(self, batch: ContinuousBatch, rows: dict[int, AnswerRow], token: NewToken) -> None:
        row = rows[token.row]
        try:
            is_over = row.take(token)
        except BaseException as error:
            row.tell(error)
            is_over = True
        if is_over:
            batch.remove(token.row)
            del rows[token.row]


async def _in(pool: ThreadPoolExecutor, work: Callable[[], Found]) -> Found:
    return await asyncio.get_running_loop().run_in_executor(pool, work)
