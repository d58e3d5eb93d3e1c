"""The life of a run in a bucket as commands, by the setting that is given an address.

RECIPE and TRAIN stand for recipes of this machine, LOCAL for a folder. The order is that of a life.
"""

from __future__ import annotations

__all__ = ["ACCEPTED", "BUCKET"]

BUCKET = "s3://bucket"
TRAIN = ["--config=TRAIN", f"--dataset={BUCKET}/datasets/one"]
ONE = f"{BUCKET}/runs/one"

_build = [
    "--config=RECIPE", f"--root={BUCKET}/raw", f"--tokenizer={BUCKET}/llm",
    f"--output={BUCKET}/datasets/one",
]  # fmt: skip
_check = ["--config=RECIPE", f"--root={BUCKET}/raw", f"--tokenizer={BUCKET}/llm"]
_second = [
    *TRAIN, f"--output={BUCKET}/runs/two", f"--init_from={ONE}",
    f"--model.language.pretrained={BUCKET}/llm",
]  # fmt: skip
_evaluate = [
    f"--run={BUCKET}/runs/two", f"--dataset={BUCKET}/datasets/one", "--output=LOCAL/answers.jsonl",
    "--device=cpu",
]  # fmt: skip
_tars = [
    "--to=webdataset", f"--dataset={BUCKET}/datasets/one", f"--root={BUCKET}/raw",
    f"--output={BUCKET}/tars",
]  # fmt: skip
_score = [
    f"--answers={BUCKET}/answers.jsonl", f"--truth={BUCKET}/truth.jsonl",
    f"--questions={BUCKET}/truth.jsonl",
]  # fmt: skip

ACCEPTED: dict[tuple[str, str], list[str]] = {
    ("tokenizer", "root"): ["--config=RECIPE", f"--root={BUCKET}/raw", "--output=LOCAL/made"],
    ("check", "root"): _check,
    ("check", "tokenizer"): _check,
    ("preprocess", "root"): _build,
    ("preprocess", "tokenizer"): _build,
    ("preprocess", "output"): _build,
    ("verify", "folders"): [f"{BUCKET}/datasets/one"],
    ("repair", "folders"): [f"{BUCKET}/datasets/one"],
    ("repair", "root"): [f"{BUCKET}/datasets/one", f"--root={BUCKET}/raw"],
    ("train", "dataset"): [*TRAIN, f"--output={ONE}", f"--model.language.pretrained={BUCKET}/llm"],
    ("train", "output"): _second,
    ("train", "init_from"): _second,
    ("train", "pretrained"): _second,
    ("estimate", "dataset"): _second,
    ("estimate", "output"): _second,
    ("estimate", "init_from"): _second,
    ("estimate", "pretrained"): _second,
    ("evaluate", "run"): _evaluate,
    ("evaluate", "dataset"): _evaluate,
    ("score", "answers"): _score,
    ("score", "truth"): _score,
    ("score", "questions"): _score,
    ("show", "folders"): [f"{BUCKET}/datasets/one", f"{BUCKET}/runs/two", "--samples=1"],
    ("report", "folders"): [f"{BUCKET}/datasets/one", f"{BUCKET}/runs/two"],
    ("export", "dataset"): _tars,
    ("export", "root"): _tars,
    ("export", "run"): [f"{BUCKET}/runs/two", "--to=hf", f"--output={BUCKET}/exports/two"],
    ("export", "output"): [f"{BUCKET}/runs/two", "--to=llava", f"--output={BUCKET}/exports/llava"],
    ("generate", "model"): [f"{BUCKET}/exports/two", "--question=What is it?", "--device=cpu",
                            "--decoding.max_new_tokens=4"],
    ("generate", "questions"): [f"{BUCKET}/runs/two", f"--questions={BUCKET}/questions.jsonl",
                                "--device=cpu", "--decoding.max_new_tokens=4"],
    ("serve", "model"): [f"{BUCKET}/runs/two"],
    ("chat", "model"): [f"{BUCKET}/runs/two"],
}  # fmt: skip
