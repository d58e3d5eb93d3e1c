"""lapilli.train: vision-language models on Ray Train and DeepSpeed."""

from lapilli.train.config import OptimConfig, RunConfig
from lapilli.train.errors import TrainError
from lapilli.train.evaluate import Trained, answer_dataset, load_trained, open_test, score
from lapilli.train.launch import Preflight, launch, preflight
from lapilli.train.loop import fit, setup
from lapilli.train.step import train_step

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
