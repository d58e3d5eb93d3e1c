"""`estimate` ends without Ray, weights or a run's folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lapilli.data.dataset.dataset import open_dataset
from lapilli.train.driver.launching import launch
from lapilli.train.driver.memory_estimate import sketch_run
from lapilli.train.driver.preflight import preflight
from lapilli.train.errors import TrainError
from lapilli.train.run_folder.metrics_file import read_metrics
from lapilli.train.steps.rows import EpochPlans
from pipelines.estimate import estimate, main, sample_operations
from tests.train.small_run import small_dataset, small_run

RECIPE = Path(__file__).parents[2] / "pipelines" / "recipes" / "tiny" / "pretrain.yaml"


def test_it_tells_memory_and_disk_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    flags = [f"--config={RECIPE}", f"--dataset={tmp_path / 'none'}", f"--output={tmp_path / 'run'}"]
    assert main([*flags, "--micro_batch_size=0"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rows of max_length, 512 tokens" in said
    assert "ZeRO-0 ZeRO-1 ZeRO-2 ZeRO-3" in said
    assert "global batch 32 = 2 workers x micro-batch 8 x accumulation 2" in said
    assert "a checkpoint" in said
    assert "memory: auto sets no bound on a CPU; no layer is recomputed" in said
    assert "while a checkpoint is saved, and as much while one is restored" in said
    assert main([*flags, "--memory=0.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "0 of 3 language layers recomputed; estimated 0." in said
    with pytest.raises(TrainError, match=r"^memory: 0\.001 gives 0\.001 GiB a worker; .* needs at"):
        main([*flags, "--memory=0.001"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("shares", [False, True])
def test_its_operations_are_those_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], shares: bool
) -> None:
    """An epoch's, added up from the rows that a run writes; what is shared counts once."""
    dataset = small_dataset(tmp_path, images=8, text_only=8, asked=2)
    config = small_run(
        dataset, tmp_path / "run", num_workers=1, launcher="process", epochs=1,
        share_images=shares, pack=shares,
    )  # fmt: skip
    launch(preflight(config))
    taken = sum(row.flops or 0 for row in read_metrics(tmp_path / "run"))
    opened = open_dataset(dataset, view=config.view, image_tokens=4)
    found = sample_operations(sketch_run(config), opened, EpochPlans(opened, config)) * len(opened)
    assert found == pytest.approx(taken, rel=1e-9)
    estimate(config)
    said = " ".join(capsys.readouterr().out.split())
    assert f"about 3 steps, {taken:.2g} operations" in said
    assert "for each 100 TFLOP/s that all workers reach" in said
