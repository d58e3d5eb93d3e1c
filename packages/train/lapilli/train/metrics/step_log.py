"""Write each step's metrics row and the samples with the highest loss, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lapilli.data.cluster_metrics import add, put
from lapilli.train.config import RunConfig
from lapilli.train.metrics.loggers import open_sinks
from lapilli.train.metrics.step_metrics import StepMeter, Worst, group_means
from lapilli.train.run_folder.generations import QuestionAnswer
from lapilli.train.run_folder.metrics_file import MetricsFile, StepMetrics, StepResult
from lapilli.train.steps.feed import StepBatches
from lapilli.train.validation.validation_loss import HeldOutLosses

__all__ = ["StepLog", "Validated"]


@dataclass(frozen=True, kw_only=True)
class Validated:
    """Results of validation after a step, if it was due.

    Attributes:
        held_out: The losses on held-out samples.
        held_out_seconds: What it took.
        generated_seconds: What answering held-out questions took.
        answers: To held-out questions.
    """

    held_out: HeldOutLosses | None = None
    held_out_seconds: float | None = None
    generated_seconds: float | None = None
    answers: Sequence[QuestionAnswer] = ()

    @property
    def seconds(self) -> float:
        """What both took: no part of the step."""
        return (self.held_out_seconds or 0.0) + (self.generated_seconds or 0.0)


class StepLog:
    """A run's written record, from `start` on; what an earlier try wrote of later steps goes."""

    def __init__(self, config: RunConfig, start: int, meter: StepMeter) -> None:
        run = Path(config.output)
        self._run = str(run)
        self._metrics = MetricsFile(run, start)
        self._worst = Worst(run, start)
        self._meter = meter
        self._sinks = open_sinks(run, start, config.loggers, asdict(config))

    def write(
        self,
        step: StepBatches,
        result: StepResult,
        losses: Sequence[float],
        validated: Validated,
        *,
        seconds: float,
        wait_seconds: float,
        memory_bytes: float,
    ) -> None:
        """Add a step.

        Args:
            step: Its samples.
            result: What it computed.
            losses: Every sample's summed loss by its place in the global batch.
            validated: What was done aside after it.
            seconds: Of the step, with waiting for data.
            wait_seconds: Waiting for data.
            memory_bytes: The most that this rank has held so far.
        """
        samples = self._meter.samples(step, losses)
        speed, held_out = self._meter.speed(step, seconds), validated.held_out
        metrics = StepMetrics(
            **vars(result),
            held_out_loss=held_out.text if held_out else None,
            held_out_aux_losses=held_out.aux if held_out else None,
            held_out_seconds=validated.held_out_seconds,
            generated_seconds=validated.generated_seconds,
            seconds=seconds,
            wait_seconds=wait_seconds,
            memory_bytes=memory_bytes,
            tokens=speed.tokens,
            rows=speed.rows,
            images=speed.images,
            tokens_per_second=speed.tokens / seconds,
            flops=speed.flops,
            mfu=speed.mfu,
            hardware_flops=speed.hardware_flops,
            hfu=speed.hfu,
            loss_by_source=group_means(samples, "source"),
            loss_by_modality=group_means(samples, "modality"),
        )
        self._metrics.write(metrics)
        self._export(metrics)
        for sink in self._sinks:
            sink.write(metrics.row())
            if validated.answers:
                sink.show(result.step, validated.answers)
        self._worst.add(samples)

    def _export(self, row: StepMetrics) -> None:
        """Tell Ray's metrics, where Ray runs."""
        for name, value in (
            ("step", row.done),
            ("loss", row.loss),
            ("tokens_per_second", row.tokens_per_second),
            ("mfu", row.mfu),
            ("step_seconds", row.seconds),
            ("wait_seconds", row.wait_seconds),
        ):
            put(f"lapilli_train_{name}", value, self._run)
        add("lapilli_train_samples", row.samples, self._run)
        add("lapilli_train_tokens", row.tokens or 0, self._run)

    def keep(self) -> None:
        """Write what is due once a checkpoint has the steps."""
        self._worst.write()

    def close(self) -> None:
        """Write what is still due."""
        self.keep()
        self._metrics.close()
        for sink in self._sinks:
            sink.close()
