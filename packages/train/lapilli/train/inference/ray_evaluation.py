"""Answer a dataset's questions on several Ray workers, each with the model whole.

They share the batches that one worker would answer, and nothing else; so the answers are its.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lapilli.data.dataset.dataset import open_dataset
from lapilli.data.dataset.shard_cache import dataset_folder
from lapilli.data.errors import DataError
from lapilli.data.ray_session import leave_working_folder, ray_session, watched
from lapilli.data.record import excerpt
from lapilli.data.trust import NOTHING, Trust
from lapilli.model.errors import ModelError
from lapilli.train.checkpoint.at_hand import local_run
from lapilli.train.config import DeviceChoice
from lapilli.train.device import RESOURCE, Device, choose_device, torch_device
from lapilli.train.errors import TrainError
from lapilli.train.inference.assistant import open_trained
from lapilli.train.inference.evaluate import Answer, Asking, Turns, in_order, only_view, open_test
from lapilli.train.validation.decoding import QuestionReader

__all__ = ["Evaluation", "answer_on_ray"]


@dataclass(frozen=True)
class Evaluation:
    """What is asked of which model, for a worker to open.

    Attributes:
        run: The model's folder, or its address, of which each machine makes a copy.
        dataset: Likewise the dataset's.
        view: Its view; empty for its only one.
        split: Of the dataset.
        template: Of a published model, as `open_trained` takes it.
        trust: What the command allows.
        shuffle_images: As `answer_dataset` takes it.
        turns: Likewise.
        choices: Likewise.
        threshold: Likewise.
        batch: Questions at once.
    """

    run: str
    dataset: str
    view: str
    split: str
    template: str = ""
    trust: Trust = NOTHING
    shuffle_images: int | None = None
    turns: Turns = "first"
    choices: tuple[str, ...] = ()
    threshold: float = 0.5
    batch: int = 256

    def open(self, device: torch.device) -> Asking:
        """The model and its questions.

        Raises:
            DataError, ModelError, TrainError: As `open_trained`, `open_test` and `answer_dataset`.
        """
        run, folder = local_run(self.run, "run"), dataset_folder(self.dataset)
        trained = open_trained(run, folder, device, self.trust, template=self.template)
        dataset = open_test(self.dataset, self.view or only_view(folder), trained, self.split)
        return Asking.of(
            trained.model, dataset, shuffle_images=self.shuffle_images, turns=self.turns,
            choices=self.choices, threshold=self.threshold, batch=self.batch,
        )  # fmt: skip


def answer_on_ray(
    evaluation: Evaluation,
    num_workers: int,
    device: DeviceChoice,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Answer on Ray's workers, one device each.

    Args:
        evaluation: What is asked; folders that are no addresses must be there on every machine.
        num_workers: Their number; more than there are batches are not started.
        device: The kind of each one's device.
        on_progress: Called with questions answered and all.

    Raises:
        DataError, ModelError, TrainError: Ray has fewer devices, or what a worker came to.
    """
    with ray_session():
        import ray

        resources = ray.cluster_resources()
        kind = choose_device(device, {k: int(resources.get(n, 0)) for k, n in RESOURCE.items()})
        slots = int(resources.get(RESOURCE[kind], 0))
        if num_workers > slots:
            raise TrainError(
                f"num_workers: {num_workers}; Ray has {slots} "
                f"{'cores' if kind == 'cpu' else f'{RESOURCE[kind]}s'}; lower it or add nodes"
            )
        return _answer(evaluation, num_workers, kind, on_progress)


def _answer(
    evaluation: Evaluation,
    num_workers: int,
    device: Device,
    on_progress: Callable[[int, int], None],
) -> list[Answer]:
    import ray

    view = evaluation.view or only_view(dataset_folder(evaluation.dataset))
    dataset = open_dataset(evaluation.dataset, view=view, image_tokens=1, split=evaluation.split)
    reader = QuestionReader.of(dataset)  # here, where its warnings are seen
    needs: dict[str, Any] = {"num_cpus": 1, "num_gpus": int(device == "cuda")}
    if device == "hpu":
        needs["resources"] = {RESOURCE[device]: 1}
    made: Any = ray.remote(_Worker).options(**needs)
    workers = [made.remote(evaluation, device, str(Path.cwd()))]
    try:
        sizes: list[int] = next(_results(lambda: [ray.get(workers[0].sizes.remote())]))
        for _ in range(1, min(num_workers, len(sizes))):
            workers.append(made.remote(evaluation, device, str(Path.cwd())))
        found: list[Answer] = []
        for answers in _results(lambda: _shared_out(workers, len(sizes))):
            found += answers
            on_progress(len(found), sum(sizes))
        return in_order(found, reader)
    finally:
        for worker in workers:
            with suppress(Exception):  # it may be gone
                ray.kill(worker)


def _shared_out(workers: list[Any], batches: int) -> Iterator[list[Answer]]:
    """The answers of each batch as it is done; a worker takes the next one when it is free."""
    from ray.util import ActorPool

    pool: Any = ActorPool(workers)
    yield from pool.map_unordered(
        lambda worker, number: worker.answer.remote(number), range(batches)
    )


def _results(calls: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """What comes from the workers; a mistake of the user's is raised as the one it is."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        yield from watched(calls)
    except RayTaskError as error:
        if isinstance(error.cause, (DataError, ModelError, TrainError)):
            raise error.cause from None
        raise
    except RayActorError as error:
        why = excerpt(" ".join(str(error).split()), 200)
        raise TrainError(
            f"num_workers: a worker was lost ({why}); look at its machine's memory, or lower "
            "num_workers or batch"
        ) from None


class _Worker:
    """A Ray actor that holds the model, which it opens when it is first asked."""

    def __init__(self, evaluation: Evaluation, device: Device, working_folder: str) -> None:
        self._evaluation, self._folder = evaluation, working_folder
        self._device: Device = device

    @cached_property
    def _asking(self) -> Asking:
        leave_working_folder(self._folder)
        return self._evaluation.open(torch_device(self._device))

    def sizes(self) -> list[int]:
        """Questions of each batch."""
        return [len(batch) for batch in self._asking.batches]

    def answer(self, number: int) -> list[Answer]:
        """A batch's answers."""
        return self._asking.answer(number)
