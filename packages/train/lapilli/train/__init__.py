"""lapilli.train: vision-language models on Ray Train and DeepSpeed."""

from lapilli.train.config import OptimConfig, RunConfig
from lapilli.train.driver.launching import Preflight, launch, preflight
from lapilli.train.errors import TrainError
from lapilli.train.inference.evaluate import Trained, answer_dataset, load_trained, open_test, score
from lapilli.train.steps.step import train_step
from lapilli.train.worker.loop import fit, setup

__all__ = [
    "OptimConfig",
    "Preflight",
    "RunConfig",
    "TrainError",
    "Trained",
    "answer_dataset",
    "fit",
    "launch",
    "load_trained",
    "open_test",
    "preflight",
    "score",
    "setup",
    "train_step",
]
