"""Which device a run takes, and what it says where that is not there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lapilli.train.config import DeviceChoice
from lapilli.train.device import (
    Device,
    check_tf32,
    choose_device,
    device_memory,
    has_habana,
    torch_device,
    use_tf32,
    visible_devices,
)
from lapilli.train.driver.preflight import preflight
from lapilli.train.driver.same_run import check_same_settings
from lapilli.train.errors import TrainError
from tests.train.small_run import small_dataset, small_run


@pytest.mark.parametrize(
    ("wanted", "there", "expected"),
    [
        ("auto", {"cuda": 8}, "cuda"),
        ("auto", {"hpu": 8}, "hpu"),
        ("auto", {"cuda": 1, "hpu": 8}, "cuda"),
        ("auto", {"cuda": 0}, "cpu"),
        ("auto", {}, "cpu"),
        ("cpu", {"cuda": 8}, "cpu"),
        ("hpu", {"cuda": 1, "hpu": 1}, "hpu"),
    ],
)
def test_a_run_takes_what_is_there(
    wanted: DeviceChoice, there: dict[Device, int], expected: Device
) -> None:
    assert choose_device(wanted, there) == expected


@pytest.mark.parametrize(("wanted", "name"), [("cuda", "GPU"), ("hpu", "HPU")])
def test_what_is_asked_for_and_not_there_is_named(wanted: DeviceChoice, name: str) -> None:
    with pytest.raises(TrainError, match=rf"device: {wanted} asked for, no {name} is visible"):
        choose_device(wanted, {"cuda": 0, "hpu": 0})


def test_the_cpu_is_torchs_own() -> None:
    assert torch_device("cpu") == torch.device("cpu")
    assert device_memory("cpu") is None
    assert visible_devices()["cuda"] == torch.cuda.device_count()


@pytest.mark.skipif(has_habana(), reason="Gaudi's software is installed here")
def test_gaudi_without_its_software_is_one_line() -> None:
    with pytest.raises(TrainError, match=r"device: hpu needs habana_frameworks"):
        torch_device("hpu")


ON_RAY = """
import sys
import ray
from lapilli.data.errors import DataError
from lapilli.train.errors import TrainError
from lapilli.train.driver.preflight import preflight
from pathlib import Path
from tests.train.small_run import small_run

ray.init("local", num_cpus=2, resources={"HPU": 2}, include_dashboard=False, log_to_driver=False)
for device, workers in (("hpu", 4), ("hpu", 2), ("auto", 2)):
    config = small_run(Path(sys.argv[1]), Path(sys.argv[2]), num_workers=workers, device=device)
    try:
        preflight(config)
    except (DataError, TrainError) as error:
        print("said:", error)
"""


@pytest.mark.faults  # for its length
@pytest.mark.skipif(has_habana(), reason="Gaudi's software is installed here")
def test_ray_is_asked_for_hpus_and_their_software(tmp_path: Path) -> None:
    """A Ray that says it has two HPUs; nothing on its workers knows them."""
    dataset = small_dataset(tmp_path, images=8, text_only=0)
    done = subprocess.run(
        [sys.executable, "-c", ON_RAY, str(dataset), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    said = [line for line in done.stdout.splitlines() if line.startswith("said:")]
    assert "num_workers: 4; Ray has 2 HPUs; lower it or add nodes" in said[0]
    assert all("habana_frameworks" in line and "where the workers are" in line for line in said[1:])
    assert len(said) == 3
    assert not (tmp_path / "run").exists()


def test_tf32_is_for_nvidia_gpus_alone(tmp_path: Path) -> None:
    for device in ("cpu", "hpu"):
        with pytest.raises(TrainError, match=f"tf32: true on {device}; NVIDIA GPUs have it"):
            check_tf32(device, True)
    check_tf32("cuda", True)
    run = small_run(small_dataset(tmp_path), tmp_path / "run", launcher="process", num_workers=1)
    with pytest.raises(TrainError, match="tf32: true on cpu"):
        preflight(replace(run, tf32=True))
    with pytest.raises(TrainError, match=r"tf32: .* was started with False, now True"):
        check_same_settings(run, replace(run, tf32=True), tmp_path)


def test_tf32_is_what_torch_is_told() -> None:
    for wanted, precision in ((True, "high"), (False, "highest")):
        use_tf32(wanted)
        assert torch.get_float32_matmul_precision() == precision
