"""Names of the files and folders in a run's folder."""

from __future__ import annotations

__all__ = [
    "CONFIG",
    "CUT",
    "DATA",
    "FACTS",
    "FILES",
    "FOLDER",
    "GENERATIONS",
    "GONE",
    "METRICS",
    "MILESTONES",
    "MISTAKE",
    "MOMENTS",
    "NOTES",
    "STARTS",
    "STATE",
    "WEIGHTS",
    "WORKERS",
    "WORST",
    "step_name",
]


METRICS = "metrics.jsonl"


STARTS = "starts.jsonl"


NOTES = "notes.txt"


GENERATIONS = "generations.jsonl"


WORST = "worst.jsonl"


WORKERS = "workers.json"


STOP = "stop"


MISTAKE = "mistake.txt"  # what a worker says before it stops for a user's mistake


FOLDER, MILESTONES = "checkpoints", "milestones"


WEIGHTS, MOMENTS = FILES = ("weights.safetensors", "moments.safetensors")


STATE, CONFIG = "state.json", "config.json"


DATA = "data"  # what a run keeps of its dataset (`dataset_files`)


FACTS = "facts.json"  # what `preflight` found when the run was last started


CUT, GONE = ".tmp", ".old"  # ends of a folder's name while it is filled, and while it is removed


def step_name(step: int) -> str:
    """The name of a step's folder; names sort as steps do."""
    return f"step-{step:08d}"
