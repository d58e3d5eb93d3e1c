"""Write each step's metrics row and the samples with the highest loss, on rank 0."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lapilli.train.config import RunConfig
from lapilli.train.metrics.loggers import open_sinks
from lapilli.train.metrics.step_metrics import StepMeter, Worst, group_means
from lapilli.train.run_folder.metrics_file import MetricsFile
from lapilli.train.steps.feed import StepBatches
from lapilli.train.validation.decoding import Asked

__all__ = ["Journal"]


class Journal:
    """A run's written record, from `start` on; what an earlier try wrote of later steps goes."""

    def __init__(self, config: RunConfig, start: int, meter: StepMeter) -> None:
        run = Path(config.output)
        self._metrics = MetricsFile(run, start)
        self._worst = Worst(run, start)
        self._meter = meter
        self._sinks = open_sinks(run, start, config.loggers, asdict(config))

    def write(
        self,
        step: StepBatches,
        row: dict[str, Any],
        losses: Sequence[float],
        answers: Sequence[Asked] = (),
    ) -> None:
        """Add a step.

        Args:
            step: Its samples.
            row: What has been measured, `seconds` among it.
            losses: Every sample's summed loss by its place in the global batch.
            answers: To held-out questions, if any were asked after this step.
        """
        samples = self._meter.samples(step, losses)
        groups = {f"loss_by_{by}": group_means(samples, by) for by in ("source", "modality")}
        whole = {**row, **self._meter.speed(step, row["seconds"]), **groups}
        self._metrics.write(whole)
        for sink in self._sinks:
            sink.write(whole)
            if answers:
                sink.show(row["step"], answers)
        self._worst.add(samples)

    def close(self) -> None:
        """Write what is still due."""
        self._worst.write()
        self._metrics.close()
        for sink in self._sinks:
            sink.close()
