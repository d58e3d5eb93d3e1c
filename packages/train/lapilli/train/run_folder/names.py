"""Names of the files and folders in a run's folder."""

from __future__ import annotations

__all__ = [
    "CONFIG",
    "CUT",
    "DATA",
    "DATA_INFO",
    "FOLDER",
    "GENERATIONS",
    "GONE",
    "METRICS",
    "MILESTONES",
    "MISTAKE",
    "NOTES",
    "PROFILE",
    "RECORDS",
    "REPLAY",
    "REPLAY_STEP",
    "REPORT",
    "RUN_INFO",
    "STACKS",
    "STARTS",
    "STATE",
    "STOP",
    "TEMPLATE",
    "VIEW",
    "WEIGHTS",
    "WORKERS",
    "WORST",
    "profile_name",
    "step_name",
]


METRICS = "metrics.jsonl"


STARTS = "starts.jsonl"


NOTES = "notes.txt"


GENERATIONS = "generations.jsonl"


WORST = "worst.jsonl"


# what rank 0 goes on writing after a restart; the starts last: they tell which copy is later
RECORDS = (METRICS, GENERATIONS, WORST, STARTS)


WORKERS = "workers.json"


STOP = "stop"


MISTAKE = "mistake.txt"  # what a worker says before it stops for a user's mistake


FOLDER, MILESTONES = "checkpoints", "milestones"


WEIGHTS = "weights.safetensors"  # of a milestone


STATE, CONFIG = "state.json", "config.json"


PROFILE = "profile"  # traces and memory snapshots of `profile.steps`


DATA = "data"  # what a run keeps of its dataset (`dataset_files`)


RUN_INFO = "facts.json"  # what `preflight` computed when the run was last started


TEMPLATE, VIEW, DATA_INFO = "template.json", "view.json", "facts.json"  # in `data`


REPLAY, REPLAY_STEP = "replay", "step.json"  # steps to run again, a folder each


REPORT = "report.html"


STACKS = "stacks"  # where each rank was when a step took too long


CUT, GONE = ".tmp", ".old"  # ends of a folder's name while it is filled, and while it is removed


def step_name(step: int) -> str:
    """The name of a step's folder; names sort as steps do."""
    return f"step-{step:08d}"


def profile_name(step: int, rank: int, ending: str) -> str:
    """Where in a run's folder a rank writes what it has profiled of a step."""
    return f"{PROFILE}/{step_name(step)}-rank-{rank}.{ending}"
